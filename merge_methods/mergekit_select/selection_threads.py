"""How a tensor is merged: in chunks of how many elements, and in which threads. No bit depends on it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import torch

from mergekit_select.selection_plan import Plan
from mergekit_select.selection_scratch import Scratch
from mergekit_select.selection_worker import Buffers

# Elements handled at once. On a processor, of 2^16 to 2^20 these were best (measured with two threads, each with 1 or 2
# MiB of L2 cache): fewer leave the threads waiting for the interpreter, more fall out of the caches. An accelerator
# has kernel launches to make up for.
_CHUNK_CPU = 1 << 18
_CHUNK_ACCELERATOR = 1 << 20
# Chunks and threads become fewer until the buffers fit in these bytes, of one thread and of all.
_WORKER_BYTES = 8 << 20
_BUFFER_BYTES = 48 << 20
# Of all threads, kept from one tensor to the next: what three of them use at most, and the odd words of their draws.
_KEPT_BYTES = (3 * _WORKER_BYTES) + (1 << 16)
# Fewer elements are merged in the calling thread, since handing them to another takes longer than it saves; in chunks
# so small that torch does not share single operations among its threads either.
_HANDED_FROM = 1 << 17
_UNSHARED_CHUNK = (1 << 15) - 4
# Fewer are merged in one thread of the pool: two would mostly wait for each other's turn at the interpreter.
_SHARED_FROM = 1 << 20

_kept = threading.local()


def share(plan: Plan) -> tuple[int, int]:
    """Return how many elements to handle at once, and in how many threads of the pool; 0 for the calling thread."""
    size, element_bytes = max(1, plan.like.numel()), Buffers.element_bytes(plan)
    if plan.like.device.type != "cpu":
        chunk = _CHUNK_ACCELERATOR
        while chunk * element_bytes > _BUFFER_BYTES:
            chunk //= 2
        return min(chunk, size), 0
    chunk = _CHUNK_CPU
    while chunk * element_bytes > _WORKER_BYTES:
        chunk //= 2
    threads = torch.get_num_threads()
    # Without OpenMP, torch has one number of threads for the whole process, which is not ours to change.
    openmp: bool = torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]  # torch's omission
    if threads == 1 or not openmp:
        return min(chunk, size), 0
    if size < _HANDED_FROM:
        return min(chunk, size, _UNSHARED_CHUNK), 0
    chunk = min(chunk, size)
    if size < _SHARED_FROM:
        return chunk, 1
    return chunk, min(threads, _BUFFER_BYTES // (chunk * element_bytes), -(-size // chunk))


@contextmanager
def scratch(device: torch.device, threads: int) -> Iterator[Scratch]:
    """Give memory for the buffers of the calling thread, which is kept for the next time if there is not too much.

    Args:
        device: Of the buffers. An accelerator's memory is kept by torch itself.
        threads: How many may keep some.
    """
    if device.type != "cpu":
        yield Scratch(device)
        return
    memory = getattr(_kept, "scratch", None) or Scratch(device)
    _kept.scratch = None
    yield memory
    if memory.bytes() * threads <= _KEPT_BYTES:
        _kept.scratch = memory


@lru_cache(maxsize=1)
def pool(threads: int) -> ThreadPoolExecutor:
    """Return that many threads, in which torch runs each operation in one thread.

    A chunk takes dozens of operations of some microseconds. Shared among torch's own threads, each of them waits for
    the slowest thread; with another process busy on one of two cores that took 10 to 100 times as long as this.
    """
    executor = ThreadPoolExecutor(threads, "mergekit-select", initializer=_single_threaded)
    started = threading.Barrier(threads + 1)
    for _ in range(threads):
        executor.submit(started.wait)
    started.wait()
    # With OpenMP each thread has a number of its own, but the last one set is what new threads begin with: restore it.
    torch.set_num_threads(threads)
    return executor


def _single_threaded() -> None:
    """Make torch run operations of the calling thread in it alone."""
    torch.set_num_threads(1)
    # A thread takes over the process's number when it first needs it, whatever was set before: need it now.
    torch.get_num_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # a fork leaves the threads behind
