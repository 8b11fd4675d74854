"""The executor's benchmark: `mergekit-select merge` with one job and two against stock `mergekit-yaml`.

`python benchmarks/executor.py --scratch FOLDER --out FOLDER` writes executor.json and executor.md to the latter. Inputs
are in the page cache as far as memory allows, or, with `--cold`, on the disk alone. The floor is a method that reads
every input and returns the first: the least that any method costs under stock mergekit. No time is ever asserted. Like
whole_process.py, this process imports neither torch nor mergekit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
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
_STOCK: Mapping[str, str] = {
    "mergekit-yaml, floor": whole_process.FLOOR,
    "mergekit-yaml, linear": "linear",
    "mergekit-yaml, selection": METHOD,
}
_NO_RECORD = ("--no-provenance",)
# Of our executor: the arguments, and whether the digests of the inputs are known from an earlier merge.
_OURS: Mapping[str, tuple[Sequence[str], bool]] = {
    "merge --jobs 1 --no-provenance": (("--jobs", "1", *_NO_RECORD), True),
    "merge --jobs 2 --no-provenance": (("--jobs", "2", *_NO_RECORD), True),
    "merge --jobs 1, inputs hashed before": (("--jobs", "1"), True),
    "merge --jobs 2, inputs hashed before": (("--jobs", "2"), True),
    "merge --jobs 1": (("--jobs", "1"), False),
    "merge --jobs 2": (("--jobs", "2"), False),
}
_RESUMED = "merge --jobs 2 --no-provenance, killed at half and resumed"


@dataclass(frozen=True)
class ContestantResult:
    """All processes of a contestant, and its median wall time as a multiple of the floor's."""

    contestant: str
    wall_seconds: Spread
    cpu_seconds: Spread
    peak_bytes: Spread
    disk_bytes: Spread
    wall_over_floor: float
    usages: list[Usage]


@click.command()
@click.option("--scratch", type=click.Path(file_okay=False, path_type=Path), required=True, help="For the checkpoints.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--rounds", default=3, show_default=True, help="Processes of each contestant.")
@click.option("--size", type=click.Choice(["tiny", "full", "large"]), default="full", show_default=True)
@click.option("--cold", is_flag=True, help="Drop the inputs from the page cache before each process.")
def main(scratch: Path, out: Path, rounds: int, size: str, cold: bool) -> None:
    """Compare whole processes; the output of two jobs is checked tensor by tensor."""
    facts = machine.describe()
    folder = scratch.resolve() / size
    whole_process._llama("write", folder, size)
    merged = folder / "merged"
    usages = round_robin(
        {name: partial(run, folder, name, merged, cold) for name in (*_STOCK, *_OURS, _RESUMED)}, rounds
    )
    run(folder, "merge --jobs 2", merged, cold)
    whole_process._llama("check", folder, size, METHOD, merged)
    results = summarise(usages)
    out.mkdir(parents=True, exist_ok=True)
    needed = sum(file.stat().st_size for file in inputs(folder))
    content = {
        "machine": facts,
        "size": size,
        "cold": cold,
        "input_bytes": needed,
        "contestants": [asdict(result) for result in results],
    }
    (out / "executor.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "executor.md").write_text(markdown(facts, results, needed), encoding="utf-8")
    click.echo(f"wrote executor.json and executor.md to {out}")


def inputs(folder: Path) -> list[Path]:
    """Return the weight files of sub-models and base."""
    return [file for file in folder.glob("*/*.safetensors") if file.parent.name != "merged"]


def run(folder: Path, contestant: str, merged: Path, cold: bool) -> Usage:
    """Merge into an empty folder, with nothing left to write from earlier merges."""
    click.echo(f"{contestant} …", err=True)
    method = _STOCK.get(contestant, METHOD)
    recipe = folder / f"{method}.yml"
    recipe.write_text(json.dumps(whole_process.recipe_of(folder, method)))
    shutil.rmtree(merged, ignore_errors=True)
    os.sync()
    for file in inputs(folder) if cold else ():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    programs = Path(sys.executable).parent
    arguments = [str(recipe), str(merged), "--quiet", "--no-copy-tokenizer"]
    if contestant in _STOCK:
        return whole_process.measure([str(programs / "mergekit-yaml"), *arguments])
    ours, known = _OURS["merge --jobs 2 --no-provenance" if contestant == _RESUMED else contestant]
    command = [str(programs / "mergekit-select"), "merge", *arguments, *ours]
    home = folder / "cache"
    if not known:
        shutil.rmtree(home, ignore_errors=True)
    elif not home.exists() and not set(_NO_RECORD) <= {*ours}:
        whole_process.measure(command, {"HF_HOME": str(home)})
        return run(folder, contestant, merged, cold)
    if contestant == _RESUMED:
        return _resumed(command, merged)
    return whole_process.measure(command, {"HF_HOME": str(home)})


def _resumed(command: Sequence[str], merged: Path) -> Usage:
    """Kill a merge once half of its parts are recorded, and go on; both together took this."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    records, plan = merged / ".merge" / "parts", merged / ".merge" / "plan.json"
    while process.poll() is None:
        if plan.exists() and records.exists():
            parts = len(json.loads(plan.read_text())["parts"])
            if len([*records.glob("*.json")]) * 2 >= parts:
                os.killpg(process.pid, signal.SIGKILL)
                break
        time.sleep(0.01)
    process.wait()
    first = time.perf_counter() - start
    second = whole_process.measure(command)
    return Usage(first + second.wall_seconds, second.cpu_seconds, second.peak_bytes, second.disk_bytes)


def summarise(usages: dict[str, list[Usage]]) -> list[ContestantResult]:
    """Return medians and spreads, and multiples of the floor's median wall time."""
    spreads = {
        name: [Spread.of([vars(usage)[what] for usage in runs]) for what in Usage.__dataclass_fields__]
        for name, runs in usages.items()
    }
    floor = next(iter(spreads.values()))[0].median
    return [
        ContestantResult(name, wall, cpu, peak, disk, wall.median / floor, usages[name])
        for name, (wall, cpu, peak, disk) in spreads.items()
    ]


def markdown(facts: dict[str, str | int | float], results: list[ContestantResult], needed: int) -> str:
    """Return all results as tables. The peak is that of the largest process, CPU of the resumed that of the second."""
    header = ["command", "wall / s", "/ floor", "CPU / s", "peak resident / MiB", "read from disk / inputs"]
    rows = [
        [
            result.contestant,
            tables.spread(result.wall_seconds),
            tables.digits(result.wall_over_floor),
            tables.spread(result.cpu_seconds),
            tables.spread(result.peak_bytes, 1 / 2**20),
            tables.digits(result.disk_bytes.median / needed),
        ]
        for result in results
    ]
    return f"{tables.machine(facts)}\n{tables.table(header, rows)}"


if __name__ == "__main__":
    main()
