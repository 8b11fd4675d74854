"""The kernel benchmark: all contestants in one process, on the same inputs, through mergekit's in-memory interface.

`python benchmarks/kernel.py --out FOLDER` writes kernel.json, kernel.md and kernel.png there. Correctness is asserted
before anything is timed; no time is ever asserted.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import click
import torch

import cases
import contestants
import correctness
import inputs
import kernel_report
import machine
import memory
from busy import one_core_busy
from cases import Case
from contestants import Contestant
from inputs import Inputs
from kernel_report import CaseResult, MemoryResult, Results, Timing
from timing import Spread, round_robin

# mergekit's own are checked on the first elements only: some of them sort the whole tensor.
_CHECKED_ELEMENTS = 1 << 16
# Of tensors of at most 4 Mi elements: a run takes a millisecond, and is easily disturbed.
_RUNS_OF_SMALL = 51
# Methods that stack hold the stack, differences, signs, masks and their products at once.
_STACKS_HELD = 6


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--full", is_flag=True, help="Everything against everything: hours.")
@click.option("--small", is_flag=True, help="The headline and tensors of at most 4 Mi elements only: two minutes.")
@click.option("--tiny", is_flag=True, help="One case of a few elements: shows that the benchmark works, no more.")
@click.option("--rounds", default=7, show_default=True, help="The most runs of each contestant in each case.")
@click.option("--seconds", default=3.0, show_default=True, help="A contestant gets no further run after so long.")
@click.option("--longest", default=10.0, show_default=True, help="Skip runs that the headline says take longer.")
@click.option("--memory/--no-memory", "with_memory", default=True, show_default=True, help="Measure peak memory.")
def main(
    out: Path, full: bool, small: bool, tiny: bool, rounds: int, seconds: float, longest: float, with_memory: bool
) -> None:
    """Compare parameter selection and resampling with mergekit's methods, a naive one, and a plain copy."""
    center = cases.TINY if tiny else cases.HEADLINE
    grid = _grid(center, full, small, tiny)
    started = time.perf_counter()
    facts = machine.describe()  # before anything runs: the load is the others'
    timed = run_cases(grid, 2 if tiny else rounds, seconds, longest)
    peaks = run_memory(center, tiny) if with_memory else []
    results = Results(facts, sys.argv[1:], timed, peaks, round(time.perf_counter() - started, 1))
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernel.json").write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    (out / "kernel.md").write_text(kernel_report.markdown(results), encoding="utf-8")
    click.echo(f"wrote kernel.json and kernel.md to {out}")
    try:
        kernel_report.plot(results, out / "kernel.png")
        click.echo(f"wrote kernel.png to {out}")
    except ModuleNotFoundError as error:  # the figures are not to be lost for it
        click.echo(f"no plot: {error}; install it with: pip install 'mergekit-select[plot]'", err=True)


def _grid(center: Case, full: bool, small: bool, tiny: bool) -> list[Case]:
    if tiny:
        return [center, replace(center, busy=True), replace(center, elements=4 * cases.KI, dtype="float32")]
    if full:
        return cases.product()
    return [center, *cases.small(center)] if small else cases.around(center)


def run_cases(grid: Sequence[Case], rounds: int, seconds: float, longest: float) -> list[CaseResult]:
    """Time every case; neighbours with the same inputs share them."""
    results: list[CaseResult] = []
    for _, group in itertools.groupby(grid, key=lambda case: case.inputs):
        alike = list(group)
        given = inputs.make(alike[0])
        for case in alike:
            click.echo(f"{case} …", err=True)
            results.append(run_case(case, given, results[0] if results else None, rounds, seconds, longest))
        del given  # before the next are made: two of them may not fit
    return results


def run_case(
    case: Case, given: Inputs, headline: CaseResult | None, rounds: int, seconds: float, longest: float
) -> CaseResult:
    """Check and then time all contestants that the case allows."""
    torch.set_num_threads(case.threads)
    skipped = {c.name: reason for c in contestants.ALL if (reason := why_skipped(c, case, headline, longest))}
    running = [c for c in contestants.ALL if c.name not in skipped]
    for contestant in running:
        check(contestant, given)
    with one_core_busy(case.busy):
        times = round_robin(
            {c.name: partial(clock, partial(c.merge, given)) for c in running},
            max(rounds, _RUNS_OF_SMALL) if case.elements <= max(cases.SMALL) and rounds > 2 else rounds,
            enough=lambda sofar: sum(sofar) + max(sofar) > seconds,
        )
    return CaseResult(case, [*_timings(times, case)], skipped)


def why_skipped(contestant: Contestant, case: Case, headline: CaseResult | None, longest: float) -> str | None:
    """Say why a contestant does not run in a case, or return None."""
    if headline is not None and contestant.name not in contestants.ALWAYS:
        return "runs in the first case only"
    if contestant.stacks and _STACKS_HELD * case.sub_models * case.tensor_bytes > machine.available_bytes():
        return "would not fit into memory"
    if headline is not None:
        work = case.sub_models * case.tensor_bytes / (headline.case.sub_models * headline.case.tensor_bytes)
        timing = headline.timing(contestant.name)
        if timing is not None and timing.seconds.median * work > longest:
            return f"would take more than {longest:g} s a run"
    return None


def check(contestant: Contestant, given: Inputs) -> None:
    """Raise unless the contestant merges these inputs rightly; for most of them the warm-up as well."""
    if contestant.check is correctness.check_finite:
        given = given.head(_CHECKED_ELEMENTS)
    try:
        contestant.check(given, contestant.merge(given))
    except correctness.WrongResultError as error:
        raise correctness.WrongResultError(f"{contestant.name}: {error}") from error


def clock(run: Callable[[], torch.Tensor]) -> float:
    """Return the seconds a run takes, without those for giving its result's memory back."""
    start = time.perf_counter()
    result = run()
    end = time.perf_counter()
    del result
    return end - start


def run_memory(center: Case, tiny: bool) -> list[MemoryResult]:
    """Measure the peaks: of linear as well in the center, in the other cases only of ours that differ in buffers."""
    results = []
    for case in [center] if tiny else cases.for_memory(center):
        names = [c.name for c in contestants.OURS[:3]]
        if case == center:
            names += [contestants.COPY, contestants.LINEAR]
        for name in [contestants.COPY, contestants.SELECTION] if tiny else names:
            click.echo(f"peak memory of {name}, {case} …", err=True)
            results.append(MemoryResult(case, name, memory.measure(name, case)))
    return results


def _timings(times: dict[str, list[float]], case: Case) -> Iterator[Timing]:
    spreads = {name: Spread.of(values) for name, values in times.items()}
    for name, spread in spreads.items():
        yield Timing(
            contestant=name,
            seconds=spread,
            all_seconds=times[name],
            times_as_fast_as_linear=spreads[contestants.LINEAR].median / spread.median,
            times_a_copy=spread.median / spreads[contestants.COPY].median,
            times_memory=spread.median / spreads[contestants.MEMORY].median,
            elements_per_second=case.elements / spread.median,
        )


if __name__ == "__main__":
    main()
