"""The whole-process benchmark: `mergekit-yaml` on a Llama of 223 M parameters, four sub-models and a base.

`python benchmarks/whole_process.py --scratch FOLDER --out FOLDER` writes whole_process.json and whole_process.md to the
latter. The floor is a method of the benchmark's own that reads the same tensors and returns the first: the least that
any method costs. Another one reads only the tensor that it returns: what mergekit costs by itself. Each method's first
merge is checked tensor by tensor, and no time is ever asserted.

This process imports neither torch nor mergekit: what wait4 says of a child's peak memory is at least what its parent
had resident when starting it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click

import machine
import tables
from timing import Spread, round_robin

FLOOR, UNREAD = "benchmark_floor", "benchmark_unread"
METHODS = (FLOOR, UNREAD, "parameter_selection", "parameter_selection_resampling", "linear")
SLOW_METHODS = ("dare_ties", "ties")  # half a minute each, which is asked for by name
_HERE = Path(__file__).resolve().parent
# A density of 1 would skip the work that makes these methods.
_PARAMETERS = {
    "linear": {"weight": 1.0},
    "dare_ties": {"weight": 0.25, "density": 0.5},
    "ties": {"weight": 0.25, "density": 0.5},
}
# As llama.py names them; that module imports torch.
_BASE, _SUB_MODELS = "base", ("sub-1", "sub-2", "sub-3", "sub-4")


@dataclass(frozen=True)
class Usage:
    """What one process took."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    disk_bytes: int = 0  # read from the disk


@dataclass(frozen=True)
class MethodResult:
    """All processes of a method, and its medians as multiples of the floor's."""

    method: str
    wall_seconds: Spread
    cpu_seconds: Spread
    peak_bytes: Spread
    wall_over_floor: float
    cpu_over_floor: float
    peak_over_floor: float
    usages: list[Usage]


@dataclass(frozen=True)
class Results:
    """All that is written to whole_process.json."""

    machine: dict[str, str | int | float]
    arguments: list[str]
    size: str
    methods: list[MethodResult]


@click.command()
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the checkpoints, kept for the next time, and the merges: 3 GiB.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--rounds", default=5, show_default=True, help="Processes of each method, after a first that is checked.")
@click.option(
    "--method", "methods", multiple=True, type=click.Choice([*METHODS, *SLOW_METHODS]), help="Only this, and the floor."
)
@click.option("--tiny", is_flag=True, help="A tiny Llama, a single process each: shows that the benchmark works.")
def main(scratch: Path, out: Path, rounds: int, methods: Sequence[str], tiny: bool) -> None:
    """Compare whole mergekit-yaml processes with the floor of any method under mergekit."""
    size = "tiny" if tiny else "full"
    facts = machine.describe()  # before anything runs: the load is the others'
    folder = scratch.resolve() / size
    _llama("write", folder, size)
    chosen = [FLOOR, *(method for method in methods if method != FLOOR)] if methods else METHODS
    usages = run(folder, size, chosen, 1 if tiny else rounds)
    results = Results(facts, sys.argv[1:], size, summarise(usages))
    out.mkdir(parents=True, exist_ok=True)
    (out / "whole_process.json").write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    (out / "whole_process.md").write_text(markdown(results), encoding="utf-8")
    click.echo(f"wrote whole_process.json and whole_process.md to {out}")


def run(folder: Path, size: str, methods: Sequence[str], rounds: int) -> dict[str, list[Usage]]:
    """Merge with each method, interleaved. The first merge of each is checked, and counts only if it is the only."""
    merged = folder / "merged"
    first = {}
    for method in methods:
        first[method] = [merge(folder, method, merged)]
        _llama("check", folder, size, method, merged)
    if rounds == 1:
        return first
    return round_robin({method: partial(merge, folder, method, merged) for method in methods}, rounds)


def merge(folder: Path, method: str, merged: Path) -> Usage:
    """Run mergekit-yaml, to an empty folder and with nothing left to write from earlier merges."""
    click.echo(f"{method} …", err=True)
    recipe = folder / f"{method}.yml"
    recipe.write_text(json.dumps(recipe_of(folder, method)))  # JSON is YAML
    shutil.rmtree(merged, ignore_errors=True)
    os.sync()
    program = Path(sys.executable).with_name("mergekit-yaml")
    # The models have no tokenizer: copying one is no part of merging.
    return measure([str(program), str(recipe), str(merged), "--quiet", "--no-copy-tokenizer"])


def recipe_of(folder: Path, method: str) -> dict[str, object]:
    """Return a recipe with absolute paths, which mergekit does not take for names on the hub."""
    return {
        "merge_method": method,
        "base_model": str(folder / _BASE),
        "models": [{"model": str(folder / name)} for name in _SUB_MODELS],
        # For all models: linear takes the base for one more input, and wants its weight too.
        "parameters": _PARAMETERS.get(method, {}),
        "dtype": "bfloat16",
    }


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, in this process's environment and what is given.

    Raises:
        RuntimeError: It failed; with what it said last.
    """
    path = os.pathsep.join(filter(None, [str(_HERE / "floor"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(environment or {})}
    start = time.perf_counter()
    # A pipe could be full while nobody reads: output goes to a file that is gone once closed.
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {said.read().decode(errors='replace')[-2000:]}")
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, usage.ru_inblock * 512)


def summarise(usages: dict[str, list[Usage]]) -> list[MethodResult]:
    """Return medians and spreads, also as multiples of the floor's medians."""
    spreads = {
        method: [Spread.of([vars(usage)[what] for usage in runs]) for what in Usage.__dataclass_fields__]
        for method, runs in usages.items()
    }
    floor = spreads[FLOOR]
    return [
        MethodResult(
            method=method,
            wall_seconds=wall,
            cpu_seconds=cpu,
            peak_bytes=peak,
            wall_over_floor=wall.median / floor[0].median,
            cpu_over_floor=cpu.median / floor[1].median,
            peak_over_floor=peak.median / floor[2].median,
            usages=usages[method],
        )
        for method, (wall, cpu, peak, _) in spreads.items()
    ]


def markdown(results: Results) -> str:
    """Return all results as tables."""
    header = ["method", "wall / s", "/ floor", "CPU / s", "/ floor", "peak resident / MiB", "/ floor"]
    rows = [
        [
            result.method,
            tables.spread(result.wall_seconds),
            tables.digits(result.wall_over_floor),
            tables.spread(result.cpu_seconds),
            tables.digits(result.cpu_over_floor),
            tables.spread(result.peak_bytes, 1 / 2**20),
            tables.digits(result.peak_over_floor),
        ]
        for result in results.methods
    ]
    return f"{tables.machine(results.machine)}\n{tables.table(header, rows)}"


def _llama(*arguments: object) -> None:
    subprocess.run([sys.executable, str(_HERE / "llama.py"), *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
