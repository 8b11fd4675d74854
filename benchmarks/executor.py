"""The executor's benchmark: `mergekit-select merge` with one job and two against stock `mergekit-yaml`.

`python benchmarks/executor.py --scratch FOLDER --out FOLDER` writes executor.json and executor.md to the latter. Inputs
are in the page cache as far as memory allows. The floor is a method that reads every input and returns the first: the
least that any method costs under stock mergekit. No time is ever asserted. Like whole_process.py, this process imports
neither torch nor mergekit.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click

import machine
import tables
import whole_process
from timing import Spread, round_robin
from whole_process import Usage

METHOD = "parameter_selection"
# Each contestant: the method, and the jobs of our executor; None for stock mergekit.
CONTESTANTS: dict[str, tuple[str, int | None]] = {
    "mergekit-yaml, floor": (whole_process.FLOOR, None),
    "mergekit-yaml, linear": ("linear", None),
    "mergekit-yaml, selection": (METHOD, None),
    "merge --jobs 1, selection": (METHOD, 1),
    "merge --jobs 2, selection": (METHOD, 2),
}


@dataclass(frozen=True)
class ContestantResult:
    """All processes of a contestant, and its median wall time as a multiple of the floor's."""

    contestant: str
    wall_seconds: Spread
    cpu_seconds: Spread
    peak_bytes: Spread
    wall_over_floor: float
    usages: list[Usage]


@click.command()
@click.option("--scratch", type=click.Path(file_okay=False, path_type=Path), required=True, help="For the checkpoints.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--rounds", default=3, show_default=True, help="Processes of each contestant.")
@click.option("--size", type=click.Choice(["tiny", "full", "large"]), default="full", show_default=True)
def main(scratch: Path, out: Path, rounds: int, size: str) -> None:
    """Compare whole processes; the output of two jobs is checked tensor by tensor."""
    facts = machine.describe()
    folder = scratch.resolve() / size
    whole_process._llama("write", folder, size)
    merged = folder / "merged"
    usages = round_robin({name: partial(run, folder, name, merged) for name in CONTESTANTS}, rounds)
    run(folder, "merge --jobs 2, selection", merged)
    whole_process._llama("check", folder, size, METHOD, merged)
    results = summarise(usages)
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "size": size, "contestants": [asdict(result) for result in results]}
    (out / "executor.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "executor.md").write_text(markdown(facts, results), encoding="utf-8")
    click.echo(f"wrote executor.json and executor.md to {out}")


def run(folder: Path, contestant: str, merged: Path) -> Usage:
    """Merge into an empty folder, with nothing left to write from earlier merges."""
    click.echo(f"{contestant} …", err=True)
    method, jobs = CONTESTANTS[contestant]
    recipe = folder / f"{method}.yml"
    recipe.write_text(json.dumps(whole_process.recipe_of(folder, method)))
    shutil.rmtree(merged, ignore_errors=True)
    os.sync()
    programs = Path(sys.executable).parent
    arguments = [str(recipe), str(merged), "--quiet", "--no-copy-tokenizer"]
    if jobs is None:
        return whole_process.measure([str(programs / "mergekit-yaml"), *arguments])
    return whole_process.measure([str(programs / "mergekit-select"), "merge", *arguments, "--jobs", str(jobs)])


def summarise(usages: dict[str, list[Usage]]) -> list[ContestantResult]:
    """Return medians and spreads, and multiples of the floor's median wall time."""
    spreads = {
        name: [Spread.of([vars(usage)[what] for usage in runs]) for what in Usage.__dataclass_fields__]
        for name, runs in usages.items()
    }
    floor = next(iter(spreads.values()))[0].median
    return [
        ContestantResult(name, wall, cpu, peak, wall.median / floor, usages[name])
        for name, (wall, cpu, peak) in spreads.items()
    ]


def markdown(facts: dict[str, str | int | float], results: list[ContestantResult]) -> str:
    """Return all results as tables. The peak is that of the largest process."""
    header = ["command", "wall / s", "/ floor", "CPU / s", "peak resident / MiB"]
    rows = [
        [
            result.contestant,
            tables.spread(result.wall_seconds),
            tables.digits(result.wall_over_floor),
            tables.spread(result.cpu_seconds),
            tables.spread(result.peak_bytes, 1 / 2**20),
        ]
        for result in results
    ]
    return f"{tables.machine(facts)}\n{tables.table(header, rows)}"


if __name__ == "__main__":
    main()
