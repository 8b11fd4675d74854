"""What the figures come to beside the budgets: `python benchmarks/budgets.py FOLDER` writes budgets.md there.

FOLDER holds kernel.json and whole_process.json, or one of them; a figure that neither has is "not measured yet".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import tables

_SELECTION = "parameter_selection"
_RESAMPLING = "parameter_selection_resampling"
_METHODS = (_SELECTION, _RESAMPLING)
_LINEAR = "linear"
_NOT_MEASURED = "not measured yet"


class _Figures:
    """The results of both benchmarks, as read from JSON. What is missing raises LookupError."""

    def __init__(self, folder: Path):
        self._kernel = _read(folder / "kernel.json")
        self._processes = _read(folder / "whole_process.json")

    def seconds(self, contestant: str, **changes: object) -> float:
        """Median of a contestant in the kernel's first case, or in the one that differs from it so."""
        wanted = {**self._kernel["cases"][0]["case"], **changes}
        for result in self._kernel["cases"]:
            if result["case"] == wanted:
                for timing in result["timings"]:
                    if timing["contestant"] == contestant:
                        return float(timing["seconds"]["median"])
        raise LookupError(contestant)

    def peaks(self) -> dict[str, float]:
        """MiB of our methods beyond inputs and outputs, the worst of all cases."""
        result: dict[str, float] = {}
        for peak in self._kernel["memory"]:
            name = peak["contestant"]
            if name.startswith(_SELECTION):
                result[name] = max(result.get(name, 0.0), peak["peak_bytes"] / 2**20)
        return result

    def over_floor(self, method: str) -> float:
        """Wall time of a whole process as a multiple of the floor's."""
        for result in self._processes["methods"]:
            if result["method"] == method:
                return float(result["wall_over_floor"])
        raise LookupError(method)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _faster_than_linear(figures: _Figures, contestant: str, **changes: object) -> float:
    return figures.seconds(_LINEAR, **changes) / figures.seconds(contestant, **changes)


def _costliest_round(figures: _Figures) -> float:
    """The most that one more round costs, as a multiple of a pass until it differs.

    With four sub-models the third round is the pass until it differs; it has no cost of its own.
    """
    selection = figures.seconds(_SELECTION)
    one, two = (figures.seconds(f"{_RESAMPLING}, rounds {rounds}") for rounds in (1, 2))
    return max(one - selection, two - one) / figures.seconds(_RESAMPLING)


def _more_threads(figures: _Figures, contestant: str) -> float:
    return figures.seconds(contestant, threads=1) / figures.seconds(contestant)


def _both(of: Callable[[str], float], unit: str) -> str:
    return "; ".join(f"{name.removeprefix('parameter_')} {tables.digits(of(name), unit)}" for name in _METHODS)


_BUDGETS: tuple[tuple[str, str, Callable[[_Figures], str]], ...] = (
    (
        "selection kernel against `linear`",
        "at least 4 times faster; aim: 8",
        lambda f: tables.digits(_faster_than_linear(f, _SELECTION), " times"),
    ),
    (
        "resampling until it differs against `linear`",
        "at least 2 times faster; aim: 4",
        lambda f: tables.digits(_faster_than_linear(f, _RESAMPLING), " times"),
    ),
    (
        "each round of resampling against a pass until it differs",
        "at most 1",
        lambda f: tables.digits(_costliest_round(f)),
    ),
    (
        "the same with another process keeping one core busy, against `linear`",
        "faster",
        lambda f: _both(lambda name: _faster_than_linear(f, name, busy=True), " times"),
    ),
    (
        "whole `mergekit-yaml` process, wall, against the floor",
        "at most 1.15",
        lambda f: _both(f.over_floor, ""),
    ),
    (
        "peak memory beyond inputs and output, the worst of all cases measured",
        "at most 64 MiB",
        lambda f: tables.digits(max(f.peaks().values()), " MiB"),
    ),
    (
        "two threads instead of one",
        "at least 1.3 times faster",
        lambda f: _both(lambda name: _more_threads(f, name), " times"),
    ),
)


def markdown(folder: Path) -> str:
    """Return the budgets with the figures measured beside them."""
    figures = _Figures(folder)
    return tables.table(["what", "budget", "measured"], ([what, due, _say(of, figures)] for what, due, of in _BUDGETS))


def _say(of: Callable[[_Figures], str], figures: _Figures) -> str:
    try:
        return of(figures)
    except (LookupError, ValueError):  # ValueError: no peaks, of which there is no greatest
        return _NOT_MEASURED


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Compare the results in FOLDER with the budgets."""
    (folder / "budgets.md").write_text(markdown(folder), encoding="utf-8")
    click.echo(f"wrote budgets.md to {folder}")


if __name__ == "__main__":
    main()
