"""The benchmarks run, and what they write is complete. They check results themselves; no time is asserted here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESAMPLING = "parameter_selection_resampling"
OURS = ["parameter_selection", RESAMPLING, *(f"{RESAMPLING}, rounds {rounds}" for rounds in (1, 2, 3))]
MERGEKITS = ["linear", "task_arithmetic", "dare_linear", "dare_ties", "ties"]
FLOOR = "benchmark_floor"
LIMITS = ["copy of one tensor", "all read, one written"]


class Finished(NamedTuple):
    folder: Path
    kernel: dict[str, Any]
    processes: dict[str, Any]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=BENCHMARKS,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )


def end(process: subprocess.Popen[str]) -> str:
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, said + errors
    return said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("benchmarks")
    both = (
        start("kernel.py", "--tiny", "--out", out),
        start("whole_process.py", "--tiny", "--method", RESAMPLING, "--scratch", out / "scratch", "--out", out),
    )
    for process in both:  # they run at once: no time counts, so they may be in each other's way
        end(process)
    end(start("budgets.py", out))
    kernel, processes = (json.loads((out / f"{name}.json").read_text()) for name in ("kernel", "whole_process"))
    return Finished(out, kernel, processes)


def test_every_contestant_ran_in_the_first_case(finished: Finished) -> None:
    first = finished.kernel["cases"][0]
    names = [timing["contestant"] for timing in first["timings"]]
    assert sorted(names) == sorted([*LIMITS, *OURS, *MERGEKITS, "naive torch"])
    assert first["skipped"] == {}


def test_every_timing_is_complete(finished: Finished) -> None:
    for case in finished.kernel["cases"]:
        by_name = {timing["contestant"]: timing for timing in case["timings"]}
        linear, copy, memory = (by_name[name]["seconds"]["median"] for name in ("linear", *LIMITS))
        for timing in by_name.values():
            seconds = timing["seconds"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
            assert seconds["runs"] == len(timing["all_seconds"]) == 2
            assert timing["times_as_fast_as_linear"] == linear / seconds["median"]
            assert timing["times_a_copy"] == seconds["median"] / copy
            assert timing["times_memory"] == seconds["median"] / memory
            assert timing["elements_per_second"] == case["case"]["elements"] / seconds["median"]


def test_after_the_first_case_ours_run_beside_linear_and_the_limits(finished: Finished) -> None:
    later = finished.kernel["cases"][1:]
    assert [case["case"]["busy"] for case in later] == [True, False]
    for case in later:
        assert {timing["contestant"] for timing in case["timings"]} == {*LIMITS, "linear", *OURS}
        assert set(case["skipped"]) == {*MERGEKITS, "naive torch"} - {"linear"}


def test_peak_memory_is_in_the_results(finished: Finished) -> None:
    assert [peak["contestant"] for peak in finished.kernel["memory"]] == ["copy of one tensor", "parameter_selection"]
    assert all(isinstance(peak["peak_bytes"], int) for peak in finished.kernel["memory"])


def test_peak_memory_is_measured() -> None:
    """Of tensors of 8 MiB, so large that what differs from one process to the next by chance does not count."""
    tensor = 8 << 20
    program = "import cases, memory, sys; print(memory.measure(sys.argv[1], cases.Case(elements=4 << 20)))"
    names = ("copy of one tensor", "naive torch", f"{RESAMPLING}, rounds 1")
    processes = [start("-c", program, name) for name in names]
    copy, naive, resampling = (int(end(process)) for process in processes)
    assert abs(copy) < tensor / 4
    assert naive > 4 * tensor  # it stacks the four sub-models
    assert abs(resampling) < tensor / 4  # a block of 256 elements is merged on the stack


def test_whole_processes_are_measured_against_the_floor(finished: Finished) -> None:
    floor, resampling = finished.processes["methods"]
    assert (floor["method"], resampling["method"]) == (FLOOR, RESAMPLING)
    for what, ratio in (("wall_seconds", "wall"), ("cpu_seconds", "cpu"), ("peak_bytes", "peak")):
        assert floor[what]["median"] > 0
        assert floor[f"{ratio}_over_floor"] == 1
        assert resampling[f"{ratio}_over_floor"] == resampling[what]["median"] / floor[what]["median"]


def test_results_say_which_machine(finished: Finished) -> None:
    for results in (finished.kernel, finished.processes):
        machine = results["machine"]
        assert machine["cores"] >= 1
        assert machine["memory_gib"] > 0
        assert {"cpu", "system", "python", "torch", "mergekit", "mergekit-select"} <= set(machine)


def test_tables(finished: Finished) -> None:
    kernel, processes, budgets = (
        (finished.folder / f"{name}.md").read_text(encoding="utf-8") for name in ("kernel", "whole_process", "budgets")
    )
    for name in [*OURS, *MERGEKITS, "naive torch"]:
        assert f"| {name} |" in kernel
    assert f"| {RESAMPLING} |" in processes
    assert "| 64 Ki, bfloat16 |" in kernel
    assert "| 4 Ki, float32 |" in kernel
    missing = [row.split("|")[1].strip() for row in budgets.splitlines() if row.endswith("| not measured yet |")]
    assert missing == [
        "against `linear` from 256 Ki to 4 Mi elements: the slowest case",
        "fp32, 32 Mi elements, against `linear`",
        "each round of resampling against a pass until it differs, the costliest for K of 4, 8, 16",
        "whole `mergekit-yaml` process, wall, against the floor",  # of selection
    ]


def test_budgets_without_results_are_not_measured(tmp_path: Path) -> None:
    end(start("budgets.py", tmp_path))
    rows = (tmp_path / "budgets.md").read_text(encoding="utf-8").splitlines()[2:]
    assert all(row.endswith("| not measured yet |") for row in rows)


def test_a_plot_is_drawn(finished: Finished) -> None:
    pytest.importorskip("matplotlib")
    assert (finished.folder / "kernel.png").read_bytes().startswith(b"\x89PNG")
