"""The compiled kernel, ``kernel.c``: finding it, calling it, and sharing its work among threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

from mergekit_select.selection.limits import Limits
from mergekit_select.selection.plan import Selection

_HERE = Path(__file__).parent
LIBRARY = _HERE / f"libkernel{ {'win32': '.dll', 'darwin': '.dylib'}.get(sys.platform, '.so') }"


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.POINTER(ctypes.c_int64)))


class _Selection(ctypes.Structure):
    _fields_ = (
        ("sub_models", ctypes.POINTER(_Tensor)),
        ("base", ctypes.POINTER(_Tensor)),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("slots", ctypes.POINTER(ctypes.c_uint16)),
        ("thresholds", ctypes.POINTER(ctypes.c_uint16)),
        ("keys", ctypes.POINTER(ctypes.c_uint64)),
        ("origin", ctypes.c_uint64),
        ("count", ctypes.c_int64),
        ("axes", ctypes.c_int64),
        ("rounds", ctypes.c_int64),
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel; None where there is none that can be loaded and belongs to this source."""
    if not LIBRARY.exists():
        return None
    try:
        result = ctypes.CDLL(str(LIBRARY))
        built_from = (ctypes.c_char * 64).in_dll(result, "mergekit_select_source").value.decode()
        merge = result.mergekit_select_merge
    except (OSError, AttributeError, ValueError) as error:
        warnings.warn(f"{LIBRARY} cannot be used, and torch's operations merge instead: {error}", stacklevel=2)
        return None
    source = _HERE / "kernel.c"  # not installed from a wheel; in a checkout it may have changed since
    if source.exists() and hashlib.sha256(source.read_bytes()).hexdigest() != built_from:
        warnings.warn(
            f"{LIBRARY} was built from another kernel.c than the one beside it, and torch's operations merge instead; "
            f"install the package again, or run: make kernel",
            stacklevel=2,
        )
        return None
    merge.argtypes = (
        ctypes.POINTER(_Selection),
        ctypes.c_int64,
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_void_p,
    )
    return result


def merge(selection: Selection, out: torch.Tensor, limits: Limits) -> None:
    """Write the merged elements to ``out``, contiguous and of the inputs' shape and dtype, on a processor."""
    if not out.numel():
        return
    compiled = library()
    assert compiled is not None  # the caller has asked
    run, width, target = compiled.mergekit_select_merge, out.itemsize, out.data_ptr()
    described, _kept = _describe(selection, out)
    given = ctypes.byref(described)
    threads = torch.get_num_threads() if out.nbytes >= limits.shared_bytes else 1
    if threads == 1:
        run(given, width, 0, out.numel(), target)
        return
    part = max(1, limits.part_bytes // width)
    starts = iter(range(0, out.numel(), part))

    def work() -> None:
        for start in starts:  # each thread takes the next part that nobody has taken
            run(given, width, start, min(start + part, out.numel()), target + start * width)

    _share(work, starts, threads)


def _describe(selection: Selection, out: torch.Tensor) -> tuple[_Selection, list[torch.Tensor]]:
    """Return what the kernel is told, and the tensors that must live as long."""
    shape = [size for size in out.shape if size != 1]
    axes = ctypes.c_int64 * len(shape)
    kept: list[torch.Tensor] = []

    def tensor(of: torch.Tensor) -> _Tensor:
        if of.data_ptr() % of.itemsize:  # as in a file whose header has an odd length; C asks for alignment
            of = of.clone()
        kept.append(of)
        if of.is_contiguous():
            return _Tensor(of.data_ptr(), None)
        strides = [stride * of.itemsize for stride, size in zip(of.stride(), of.shape, strict=True) if size != 1]
        return _Tensor(of.data_ptr(), axes(*strides))

    count = len(selection.tensors)
    described = _Selection(
        sub_models=(_Tensor * count)(*map(tensor, selection.tensors)),
        base=None if selection.base is None else ctypes.pointer(tensor(selection.base)),
        shape=axes(*shape),
        slots=(ctypes.c_uint16 * count)(*selection.slots),
        thresholds=(ctypes.c_uint16 * count)(*selection.thresholds),
        keys=(ctypes.c_uint64 * len(selection.keys))(*selection.keys),
        origin=selection.origin,
        count=count,
        axes=len(shape),
        rounds=-1 if selection.rounds is None else selection.rounds,
    )
    return described, kept


def _share(work: Callable[[], None], parts: Iterator[int], threads: int) -> None:
    """Work in the calling thread and in others beside it, as many in all as are given.

    The calling thread never waits for one that has not begun: where a busy machine lets none of them run, it does all
    the work itself.
    """
    others: list[Future[None]] = []
    try:
        pool = _pool(threads - 1)
        for _ in range(threads - 1):
            others.append(pool.submit(work))
    except RuntimeError:  # the interpreter is ending, or the system gives no thread
        pass
    try:
        work()
    finally:
        for _ in parts:  # where this thread was interrupted, the others find nothing left to do
            pass
        for other in others:
            if not other.cancel():
                other.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mergekit-select")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork leaves the threads behind
