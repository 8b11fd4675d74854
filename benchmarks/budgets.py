"""What the figures come to beside the budgets: `python benchmarks/budgets.py FOLDER` writes budgets.md there.

FOLDER holds kernel.json and whole_process.json, or one of them; a figure that neither has is "not measured yet".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

import cases
import tables

_SELECTION = "parameter_selection"
_RESAMPLING = "parameter_selection_resampling"
_METHODS = (_SELECTION, _RESAMPLING)
_LINEAR = "linear"
_MEMORY = "all read, one written"
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

    def cases(self) -> list[Any]:
        """All cases of the kernel benchmark."""
        return list(self._kernel["cases"])

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
    """The most that one more round costs for any K, as a multiple of a pass until it differs.

    The last round of K sub-models is the pass until it differs; it has no cost of its own.
    """
    costs = []
    for count in (4, 8, 16):
        times = [figures.seconds(_SELECTION, sub_models=count)]
        times += [figures.seconds(f"{_RESAMPLING}, rounds {r}", sub_models=count) for r in range(1, min(4, count - 1))]
        until = figures.seconds(_RESAMPLING, sub_models=count)
        costs += [(after - before) / until for before, after in pairwise(times)]
    return max(costs)


def _slowest(figures: _Figures, contestant: str, least: int, most: int) -> float:
    """The least ratio to linear of all cases that have so many elements and no busy process."""
    return min(
        timing["times_as_fast_as_linear"]
        for result in figures.cases()
        if least <= result["case"]["elements"] <= most and not result["case"]["busy"]
        for timing in result["timings"]
        if timing["contestant"] == contestant
    )


def _of_memory(figures: _Figures) -> float:
    return figures.seconds(_MEMORY) / figures.seconds(_SELECTION)


def _both(of: Callable[[str], float], unit: str) -> str:
    return "; ".join(f"{name.removeprefix('parameter_')} {tables.digits(of(name), unit)}" for name in _METHODS)


_BUDGETS: tuple[tuple[str, str, Callable[[_Figures], str]], ...] = (
    (
        "selection kernel against `linear`",
        "at least 8 times faster",
        lambda f: tables.digits(_faster_than_linear(f, _SELECTION), " times"),
    ),
    (
        "the same as a share of the speed of memory",
        "aim: 0.9",
        lambda f: tables.digits(_of_memory(f)),
    ),
    (
        "resampling until it differs against `linear`",
        "at least 5 times faster",
        lambda f: tables.digits(_faster_than_linear(f, _RESAMPLING), " times"),
    ),
    (
        "against `linear` at any size, dtype, K, number of threads: the slowest case",
        "at least as fast",
        lambda f: _both(lambda name: _slowest(f, name, 0, 1 << 40), " times"),
    ),
    (
        "against `linear` from 256 Ki to 4 Mi elements: the slowest case",
        "at least 3 times faster",
        lambda f: _both(lambda name: _slowest(f, name, 256 * cases.KI, 4 * cases.MI), " times"),
    ),
    (
        "fp32, 32 Mi elements, against `linear`",
        "at least 1.5 times faster; resampling 1",
        lambda f: _both(lambda name: _faster_than_linear(f, name, dtype="float32"), " times"),
    ),
    (
        "each round of resampling against a pass until it differs, the costliest for K of 4, 8, 16",
        "at most 1",
        lambda f: tables.digits(_costliest_round(f)),
    ),
    (
        "the headline with another process keeping one core busy, against `linear`",
        "faster",
        lambda f: _both(lambda name: _faster_than_linear(f, name, busy=True), " times"),
    ),
    (
        "whole `mergekit-yaml` process, wall, against the floor",
        "at most 1.05; resampling 1.08",
        lambda f: _both(f.over_floor, ""),
    ),
    (
        "peak memory beyond inputs and output, the worst of all cases measured",
        "at most 64 MiB",
        lambda f: tables.digits(max(f.peaks().values()), " MiB"),
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
