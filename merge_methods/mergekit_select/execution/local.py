"""One machine: this process and its helpers work on the parts of one folder, each taking what nobody has.

There is no other coordination than the folder, so a helper may be killed at any time, and so may this process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_select.errors import MergekitSelectError, PlanError
from mergekit_select.execution.request import Request
from mergekit_select.inputs.processors import cores

if TYPE_CHECKING:
    from mergekit_select.execution.job import Job
    from mergekit_select.inputs.checkpoint import StoredTensor

_PAUSE = 0.05  # seconds between two looks at what others have done
_EARLY = 8  # processes that are started before the merge is planned, at most
PROCESS_BYTES = 1 << 30  # bytes that Python, torch and mergekit take in each process


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        out: The output folder.
        finished: Whether it is a finished model; a share of a merge leaves it unfinished while others are missing.
        missing: How many parts are missing.
        jobs: How many processes worked.
        tensors: Of a finished merge, each tensor's description and digest.
        anew: Whether something was computed now.
        notes: What else the reader should know.
    """

    out: Path
    finished: bool
    missing: int
    jobs: int
    tensors: Mapping[str, tuple[StoredTensor, str]]
    anew: bool
    notes: tuple[str, ...] = ()


Started = Callable[["Job", int], None]
Progress = Callable[["Job"], None]


def merge(
    request: Request,
    *,
    jobs: int | None = None,
    only_finish: bool = False,
    rehash: bool = False,
    started: Started = lambda job, jobs: None,
    progress: Progress = lambda job: None,
) -> Outcome:
    """Merge, or go on with a merge that was interrupted.

    Args:
        request: What to merge.
        jobs: How many processes; None for as many as cores and memory allow.
        only_finish: Only finish a merge whose parts are all recorded.
        rehash: Read recorded parts again, and compute those that are damaged anew.
        started: Called with the merge once it is planned, and with the number of processes.
        progress: Called with it whenever more may be done.

    Raises:
        MergekitSelectError: The merge is refused, or something cannot be read or written.
    """
    # Loading torch and mergekit takes as long as merging a gigabyte: helpers do it while this process does. Where there
    # are many cores, the rest is started once it is known how many there is work and memory for.
    wanted = 1 if only_finish else jobs or max(1, min(cores(), _EARLY, free_memory() // PROCESS_BYTES))
    helpers = [_start_helper(request, number, jobs) for number in range(1, wanted)]
    try:
        _load()
        from mergekit_select.execution.job import opened_job

        with opened_job(request) as job:
            if not only_finish and jobs is None:
                helpers += [_start_helper(request, number, jobs) for number in range(wanted, usable_jobs(job))]
            return _merge(job, helpers, jobs, only_finish, rehash, started, progress)
    finally:
        for helper in helpers:
            helper.kill()
            helper.join()


def _merge(
    job: Job,
    helpers: Sequence[BaseProcess],
    jobs: int | None,
    only_finish: bool,
    rehash: bool,
    started: Started,
    progress: Progress,
) -> Outcome:
    from mergekit_select.execution.finish import finish
    from mergekit_select.execution.work import forget_lost, work
    from mergekit_select.execution.workspace import WHOLE, share_lock
    from mergekit_select.planner.together import share_threads

    workspace, share = job.workspace, job.request.share
    parts = job.parts()
    free = workspace.acquire(WHOLE, shared=share is not None) and (
        share is None or workspace.acquire(share_lock(share[0]))
    )
    if not free:
        what = "the whole" if share is None else "all, or this share,"
        raise PlanError(f"another process is merging {what} into {workspace.out}; wait for it, or stop it")
    notes = job.cautions()
    if not workspace.finished and (lost := forget_lost(job, rehash)):
        notes.append(f"{lost} parts were recorded, and not there or damaged: computed again")
    count, anew = jobs or usable_jobs(job), not workspace.finished
    started(job, count)
    if not only_finish:
        share_threads(job.engine.plan.config, job.engine.plan.options, count)
        mine = {part.number for part in parts}
        while left := [part for part in job.missing() if part.number in mine]:
            work(job, left, lambda: progress(job))
            progress(job)
            if any(part.number in mine for part in job.missing()):
                time.sleep(_PAUSE)  # others are at the rest, or die and leave it
        ended = [helper.exitcode for helper in helpers[: count - 1] if helper.exitcode]
        if ended:
            notes.append(f"{len(ended)} of {count} processes ended early (exit code {ended[0]}); the others went on")
    tensors: Mapping[str, tuple[StoredTensor, str]] = {}
    missing = job.missing()
    if not missing:
        tensors = finish(job, rehash)
    elif only_finish:
        raise PlanError(
            f"{workspace.out} cannot be finished: {len(missing)} of {len(job.layout.parts)} parts are missing"
        )
    return Outcome(workspace.out, not missing, len(missing), count, tensors, anew, tuple(notes))


def _load() -> None:
    """Import torch, mergekit and the rest of this room.

    They make millions of objects that stay; looking for garbage among them takes a sixth of the time.
    """
    gc.disable()
    import mergekit_select.execution.finish
    import mergekit_select.execution.work  # noqa: F401

    gc.freeze()
    gc.enable()


def _start_helper(request: Request, number: int, jobs: int | None) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=help_merge, args=(request, number, jobs), daemon=True)
    process.start()
    return process


def help_merge(request: Request, number: int, jobs: int | None) -> None:
    """Work on a merge that the parent plans, in a process of its own. Why it fails, the parent will find out itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of this process
    _load()
    from mergekit_select.execution.job import opened_job
    from mergekit_select.execution.work import work
    from mergekit_select.inputs.files import WORKSPACE
    from mergekit_select.planner.together import share_threads

    while not Path(request.out, WORKSPACE, "plan.json").exists():
        if not parent.is_alive():
            return
        time.sleep(_PAUSE)
    try:
        with opened_job(request) as job:
            count = jobs or usable_jobs(job)
            if number < count:
                share_threads(job.engine.plan.config, job.engine.plan.options, count)
                work(job, job.parts(), lambda: None if parent.is_alive() else os._exit(1))
    except MergekitSelectError:
        sys.exit(1)


def usable_jobs(job: Job) -> int:
    """Return how many processes cores and free memory allow, and there is work for."""
    in_memory = free_memory() // (PROCESS_BYTES + job.layout.peak)
    return max(1, min(cores(), in_memory, len(job.parts())))


def free_memory() -> int:
    """Return the bytes of memory that nobody uses; all there are where the system does not say."""
    known = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS has not the first
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(known)
