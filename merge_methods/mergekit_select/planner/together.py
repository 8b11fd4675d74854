"""Go through a plan's tensors with several processes, each of which plans for itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_select.inputs.processors import cores
from mergekit_select.planner.determinism import Determinism, determinism
from mergekit_select.planner.engine import Engine
from mergekit_select.planner.opening import opened
from mergekit_select.planner.plan import PlannedTensor
from mergekit_select.planner.vocabulary import tokenizer_source

_Answer = TypeVar("_Answer")
Progress = Callable[[Iterable[PlannedTensor]], Iterable[PlannedTensor]]
_AHEAD = 2  # tensors that each helper is given at a time
_opened: ExitStack  # what a helper keeps open
_engine: Engine  # a helper's own


def threads_each(config: MergeConfiguration, options: MergeOptions, jobs: int) -> int:
    """Return torch's threads for each process: its share of the cores, where their number cannot change a bit."""
    if options.num_threads is not None:
        return options.num_threads
    if jobs > 1 and determinism(config.merge_method) is Determinism.EXACT:
        return max(1, cores() // jobs)
    return torch.get_num_threads()


def share_threads(config: MergeConfiguration, options: MergeOptions, jobs: int) -> None:
    """Take this process's share of the cores, for as long as it lives."""
    torch.set_num_threads(threads_each(config, options, jobs))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute in so many threads, in a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(
    engine: Engine,
    config: MergeConfiguration,
    options: MergeOptions,
    answer: Callable[[Engine, PlannedTensor], _Answer],
    *,
    jobs: int = 1,
    progress: Progress = lambda tensors: tensors,
) -> Iterator[tuple[PlannedTensor, _Answer]]:
    """Yield every tensor of a plan with what is to be known of it, in the plan's order.

    Args:
        engine: Of this recipe and these options.
        config: The recipe, from which helpers plan again.
        options: The merge's options.
        answer: What is to be known. Helpers get it, and give the answer back, through pickle.
        jobs: How many processes work, this one included. It is one where the order of tensors matters: draws from
            torch's generator, methods that are not known, tokens of a union.
        progress: Wraps the tensors as they are gone through.

    Raises:
        MergekitSelectError: As ``answer`` does.
    """
    ordered = determinism(config.merge_method) in (Determinism.RANDOM, Determinism.UNKNOWN)
    if jobs == 1 or ordered or options.random_seed is not None or tokenizer_source(config) == "union":
        for planned in progress(engine.tensors):
            yield planned, answer(engine, planned)
        return
    count = threads_each(config, options, jobs)
    tensors, ticks, answers = engine.tensors, iter(progress(engine.tensors)), dict[int, _Answer]()
    left, running = deque(range(len(tensors))), dict[int, Future[_Answer]]()
    helpers = ProcessPoolExecutor(
        jobs - 1, multiprocessing.get_context("spawn"), initializer=_open, initargs=(config, options, count)
    )
    with threads(count), helpers:
        while left or running:
            # A helper that dies, such as for lack of memory, ends the pool: this process does the rest.
            with suppress(BrokenProcessPool):
                while left and len(running) < _AHEAD * (jobs - 1):
                    running[left[0]] = helpers.submit(_answer, answer, left[0])
                    left.popleft()
            if left:
                number = left.popleft()
                answers[number] = answer(engine, tensors[number])
                next(ticks)
            for number in [number for number, future in running.items() if future.done() or not left]:
                try:
                    answers[number] = running.pop(number).result()
                except BrokenProcessPool:
                    answers[number] = answer(engine, tensors[number])
                next(ticks)
        next(ticks, None)
    for number, planned in enumerate(tensors):
        yield planned, answers[number]


def _open(config: MergeConfiguration, options: MergeOptions, count: int) -> None:
    """Plan in a helper, for as long as it lives."""
    global _engine, _opened
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its helpers
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of this process
    torch.set_num_threads(count)
    _opened = ExitStack()
    _engine = _opened.enter_context(opened(config, options))


def _answer(answer: Callable[[Engine, PlannedTensor], _Answer], number: int) -> _Answer:
    return answer(_engine, _engine.tensors[number])
