"""The compiled kernel, ``kernel.c``: finding it, calling it, and sharing its work among threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from mergekit_select.selection.limits import Limits
from mergekit_select.selection.plan import Selection

LIBRARY = Path(__file__).parent / f"libkernel{ {'win32': '.dll', 'darwin': '.dylib'}.get(sys.platform, '.so') }"


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
    """Return the compiled kernel; None where there is none, or none that can be used."""
    if not LIBRARY.exists():
        return None
    source = LIBRARY.with_name("kernel.c")  # not installed from a wheel; in a checkout it may have changed
    try:
        result = ctypes.CDLL(str(LIBRARY))
        built_from = (ctypes.c_char * 64).in_dll(result, "mergekit_select_source").value.decode()
        if source.exists() and hashlib.sha256(source.read_bytes()).hexdigest() != built_from:
            raise OSError("it was built from another kernel.c than the one beside it")
    except (OSError, ValueError) as error:  # ValueError: it has no such symbol
        problem = f"the compiled kernel {LIBRARY} cannot be used, and torch's operations merge instead: {error}"
        warnings.warn(f"{problem}; install the package again, or run: make kernel", stacklevel=2)
        return None
    return result


def merge(selection: Selection, out: torch.Tensor, limits: Limits) -> None:
    """Write the merged elements to ``out``, contiguous and of the inputs' shape and dtype, on a processor."""
    if not out.numel():
        return
    width, size, address = out.itemsize, out.numel(), out.data_ptr()
    described, kept = _describe(selection, out)
    run = function(width)
    part = max(1, limits.part_bytes // width)
    starts = iter(range(0, size, part))

    # A second interrupt may end this call while a thread still writes: what it works on must live as long as its work.
    def work(_alive: object = (out, kept)) -> None:
        for start in starts:  # each thread takes the next part that nobody has taken
            run(ctypes.byref(described), start, min(start + part, size), address + start * width)

    threads = torch.get_num_threads() if out.nbytes >= limits.shared_bytes else 1
    if threads > 1:
        _share(work, starts, threads - 1)
    else:
        work()


@lru_cache(maxsize=4)
def function(width: int) -> Callable[..., None]:
    """Return the library's function for elements of so many bytes."""
    compiled = library()
    assert compiled is not None  # the caller has asked
    result = compiled[f"mergekit_select_merge_{8 * width}"]
    result.argtypes = (ctypes.POINTER(_Selection), ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p)
    result.restype = None
    return result


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


def _share(work: Callable[[], None], parts: Iterator[int], others: int) -> None:
    """Work in the calling thread and in so many others.

    The calling thread never waits for one that has not begun: where a busy machine lets none of them run, it does all
    the work itself.
    """
    helpers: list[Future[None]] = []
    try:
        with suppress(RuntimeError):  # the interpreter is ending, or the system gives no thread
            helpers.extend(_pool(others).submit(work) for _ in range(others))
        work()
    finally:
        for _ in parts:  # where this thread was interrupted, the others find nothing left to do
            pass
        for helper in helpers:
            if not helper.cancel():
                helper.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "mergekit-select")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork leaves the threads behind
