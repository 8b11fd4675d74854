"""Results of the kernel benchmark, and how they are shown: as Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import contestants
import tables
from cases import MI, Case
from timing import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = (contestants.COPY, contestants.MEMORY, contestants.SELECTION, contestants.RESAMPLING, contestants.LINEAR)


_OURS = (contestants.SELECTION, contestants.RESAMPLING, f"{contestants.RESAMPLING}, rounds 1")


@dataclass(frozen=True)
class Timing:
    """A contestant in a case: seconds of a run, and what they come to beside the others' medians."""

    contestant: str
    seconds: Spread
    all_seconds: list[float]
    times_as_fast_as_linear: float
    times_a_copy: float
    times_memory: float
    elements_per_second: float


@dataclass(frozen=True)
class CaseResult:
    """All contestants of a case, and why some did not run."""

    case: Case
    timings: list[Timing]
    skipped: dict[str, str]

    def timing(self, contestant: str) -> Timing | None:
        """Return a contestant's timing, or None if it did not run."""
        return next((timing for timing in self.timings if timing.contestant == contestant), None)


@dataclass(frozen=True)
class MemoryResult:
    """The peak of a contestant in a case, beyond inputs and output."""

    case: Case
    contestant: str
    peak_bytes: int


@dataclass(frozen=True)
class Results:
    """All that is written to kernel.json; the first of the cases is the one that the others vary."""

    machine: dict[str, str | int | float]
    arguments: list[str]
    cases: list[CaseResult]
    memory: list[MemoryResult]
    took_seconds: float


def markdown(results: Results) -> str:
    """Return all results as tables."""
    parts = [tables.machine(results.machine), _size_table(results), *map(_case_table, results.cases)]
    if results.memory:
        parts.append(_memory_table(results))
    return "\n".join(parts)


def _case_table(result: CaseResult) -> str:
    header = ["contestant", "ms: median (range)", "linear / this", "this / copy", "this / memory", "G elements/s"]
    rows = [
        [
            timing.contestant,
            tables.spread(timing.seconds, 1e3),
            tables.digits(timing.times_as_fast_as_linear),
            tables.digits(timing.times_a_copy),
            tables.digits(timing.times_memory),
            tables.digits(timing.elements_per_second / 1e9),
        ]
        for timing in result.timings
    ]
    skipped: dict[str, list[str]] = {}
    for name, reason in result.skipped.items():
        skipped.setdefault(reason, []).append(name)
    notes = "".join(f"\nNot run: {', '.join(names)} ({reason}).\n" for reason, names in skipped.items())
    return f"### {result.case}\n\n{tables.table(header, rows)}{notes}"


def _size_table(results: Results) -> str:
    """Lay out microseconds by size and dtype, and beside them how many times as long linear and memory take."""
    center = vars(results.cases[0].case)
    header = ["elements, dtype", "memory / us", "linear / us", *(f"{name} / us (linear / this)" for name in _OURS)]
    rows = []
    for result in results.cases:
        varied = {key for key, value in vars(result.case).items() if value != center[key]}
        if varied <= {"elements", "dtype"}:
            found = [result.timing(name) for name in (contestants.MEMORY, contestants.LINEAR, *_OURS)]
            memory, linear, *ours = (timing for timing in found if timing)
            cells = [tables.digits(timing.seconds.median * 1e6) for timing in (memory, linear)]
            cells += [f"{tables.digits(t.seconds.median * 1e6)} ({t.times_as_fast_as_linear:.1f})" for t in ours]
            rows.append([f"{result.case.size}, {result.case.dtype}", *cells])
    return f"### By size\n\n{tables.table(header, rows)}"


def _memory_table(results: Results) -> str:
    header = ["contestant", "case", "MiB beyond inputs and output", "in tensors"]
    rows = [
        [peak.contestant, str(peak.case), tables.digits(peak.peak_bytes / MI), _in_tensors(peak)]
        for peak in results.memory
    ]
    return f"### Peak memory\n\n{tables.table(header, rows)}"


def _in_tensors(peak: MemoryResult) -> str:
    return tables.digits(peak.peak_bytes / peak.case.tensor_bytes)


def plot(results: Results, file: Path) -> None:
    """Draw the first case's contestants, and how time grows with elements and with sub-models."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), width_ratios=(2, 1, 1), layout="constrained")
    _draw_contestants(left, results.cases[0])
    _draw_growth(middle, results, "elements", lambda case: case.elements / MI, "elements / Mi")
    _draw_growth(right, results, "sub_models", lambda case: case.sub_models, "sub-models")
    figure.suptitle(f"{results.cases[0].case}; {results.machine['cpu']}", fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_contestants(axes: Axes, result: CaseResult) -> None:
    timings = result.timings[::-1]
    values = [timing.seconds.median * 1e3 for timing in timings]
    errors = [
        [(timing.seconds.median - timing.seconds.low) * 1e3 for timing in timings],
        [(timing.seconds.high - timing.seconds.median) * 1e3 for timing in timings],
    ]
    ours = {contestant.name for contestant in contestants.OURS}
    colors = ["tab:blue" if timing.contestant in ours else "tab:gray" for timing in timings]
    axes.barh([timing.contestant for timing in timings], values, xerr=errors, color=colors)
    axes.set_xscale("log")
    axes.set_xlabel("ms, median and range")
    axes.tick_params(axis="y", labelsize=8)


def _draw_growth(axes: Axes, results: Results, varied: str, x_of: Callable[[Case], float], label: str) -> None:
    """Draw time per element against one property, over the cases that vary nothing else."""
    alike = [*_varying(results, varied)]
    for name in _LINES:
        timings = [(result.case, timing) for result in alike if (timing := result.timing(name))]
        points = sorted((x_of(case), timing.seconds.median / case.elements * 1e9) for case, timing in timings)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("ns an element")
    axes.legend(fontsize=7, loc="best")


def _varying(results: Results, varied: str) -> Iterator[CaseResult]:
    center = vars(results.cases[0].case)
    for result in results.cases:
        if all(value == center[key] for key, value in vars(result.case).items() if key != varied):
            yield result
