"""How a merge uses the machine: threads, forks, interrupts, huge pages, which kernel. No bit depends on any of it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_select import resample, select
from mergekit_select.errors import ParameterError
from mergekit_select.selection import kernel_c, kernel_name, limits
from mergekit_select.selection.limits import LIMITS, Limits, new_tensor
from mergekit_select.selection.merge import merge
from mergekit_select.selection.plan import Selection, make_selection
from tests.selection.selection_inputs import DTYPES, inputs, same

compiled = pytest.mark.skipif(kernel_c.library() is None, reason="the kernel was not compiled here")
SHARED = Limits(shared_bytes=1, part_bytes=4096)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def plan(size: int = 100_000, dtype: torch.dtype = torch.bfloat16, rounds: int | None = 1) -> Selection:
    tensors, base = inputs(3, (size,), dtype)
    return make_selection(tensors, base, None, rounds, 0, "")


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [None, 1])
def test_threads_and_parts_change_no_bit(
    dtype: torch.dtype, rounds: int | None, threads: Callable[[int], None]
) -> None:
    selection = plan(70_001, dtype, rounds)
    threads(1)
    expected = merge(selection)
    for number, part in [(1, 64), (2, 4096), (3, 1 << 14), (2, 1 << 20), (5, 24)]:
        threads(number)
        assert same(merge(selection, Limits(shared_bytes=1, part_bytes=part)), expected)
        assert torch.get_num_threads() == number


@compiled
@pytest.mark.parametrize(
    ("number", "size", "pools"), [(1, 1 << 22, 0), (2, (1 << 22) - 1, 0), (2, 1 << 22, 1), (5, 1 << 22, 4)]
)
def test_only_large_results_and_as_many_threads_as_torch_has(
    number: int, size: int, pools: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def pool(count: int) -> _Refusing:
        asked.append(count)
        return _Refusing()

    monkeypatch.setattr(kernel_c, "_pool", pool)
    threads(number)
    select([torch.zeros(size, dtype=torch.float8_e5m2)] * 2)
    assert asked == ([pools] if pools else [])


class _Refusing:
    """A pool that has no thread to give, as when the interpreter is ending."""

    def submit(self, _work: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")


class _Idle:
    """A pool whose threads never begin, as on a machine that is busy with something else."""

    def __init__(self) -> None:
        self.futures: list[Any] = []

    def submit(self, _work: Any) -> Any:
        from concurrent.futures import Future

        self.futures.append(Future())
        return self.futures[-1]


@compiled
@pytest.mark.parametrize("pool", [_Refusing, _Idle])
def test_a_merge_does_not_wait_for_threads_that_do_not_begin(
    pool: Any, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = plan()
    threads(1)
    expected = merge(selection)
    threads(2)
    monkeypatch.setattr(kernel_c, "_pool", lambda _count: pool())
    assert same(merge(selection, SHARED), expected)


def test_an_interrupted_thread_leaves_the_others_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_c, "_pool", lambda _count: _Idle())
    parts = iter(range(10))

    def interrupted() -> None:
        next(parts)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernel_c._share(interrupted, parts, 1)
    assert list(parts) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks beside threads, by Python 3.12 and later
def test_a_fork_begins_without_the_threads_of_its_parent() -> None:
    kernel_c._pool(1)
    child = os.fork()
    if not child:
        os._exit(kernel_c._pool.cache_info().currsize)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_of_an_earlier_number_are_not_kept() -> None:
    for number in (1, 2):
        kernel_c._pool(number)
    assert kernel_c._pool.cache_info().currsize == 1


@compiled
def test_many_threads_may_merge_at_once(threads: Callable[[int], None]) -> None:
    threads(3)
    selection = plan()
    expected = merge(selection)
    found = []
    callers = [threading.Thread(target=lambda: found.append(merge(selection, SHARED))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 8
    assert all(same(merged, expected) for merged in found)


@compiled
def test_what_the_kernel_is_told_lives_as_long_as_it_is_needed() -> None:
    """Strides and copies of strided tensors that only ctypes points to."""
    tensors = [torch.arange(64.0).view(8, 8).t()[:, ::2] + 0 for _ in range(4)]
    strided = [torch.arange(64.0).view(8, 8).t()[:, ::2] for _ in range(4)]
    described, kept = kernel_c._describe(make_selection(strided, strided[0], None, None, 0, ""), strided[0])
    gc.collect()
    churn = [torch.full((8,), -1, dtype=torch.int64) for _ in range(100)]
    out = torch.empty(8, 4)
    kernel_c.function(4)(ctypes.byref(described), 0, 32, out.data_ptr())
    assert same(out, resample(tensors, tensors[0]))
    assert len(kept) == 5
    assert len(churn) == 100


def _python(code: str, **variables: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_FORKS = """
import hashlib, multiprocessing, sys, torch
from mergekit_select import select
torch.set_num_threads(2)
tensors = [torch.arange(3 << 20, dtype=torch.float32) + k / 8 for k in range(3)]
def merged(_=None):
    # No operation of torch's: those hang in a fork of a process whose torch has used threads.
    return hashlib.sha256(select(tensors).numpy()).hexdigest()
if __name__ == "__main__":
    here = merged()
    context = multiprocessing.get_context(sys.argv[1])
    with context.Pool(2) as pool:
        there = pool.map(merged, range(3), chunksize=1)
    print(there == [here] * 3)
"""


@compiled
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_children_merge_after_their_parent_has(method: str, tmp_path: Path) -> None:
    file = tmp_path / "forks.py"
    file.write_text(_FORKS)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", file, method],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "True\n", done.stderr


_INTERRUPTED = """
import torch
from mergekit_select import resample
torch.set_num_threads(2)
tensors = [torch.zeros(1 << 25, dtype=torch.bfloat16) for _ in range(3)]
expected = resample(tensors, tensors[0])
for _ in range(25):
    try:
        print("ready", flush=True)
        while True:
            resample(tensors, tensors[0])
    except KeyboardInterrupt:
        pass
assert torch.equal(resample(tensors, tensors[0]), expected)
print("again", flush=True)
"""


@compiled
def test_an_interrupt_ends_a_merge_and_the_next_one_works() -> None:
    process = _python(_INTERRUPTED)
    assert process.stdout is not None
    for number in range(25):
        assert process.stdout.readline() == "ready\n", process.stderr
        time.sleep(0.02 + number / 500)
        process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert (said, process.returncode) == ("again\n", 0), errors


# ---- memory


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has huge pages to ask for")
def test_huge_pages_are_asked_for_large_results_alone(taken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Libc:
        def madvise(self, address: Any, length: Any, advice: Any) -> int:
            asked.append((address.value, length.value, advice))
            return ctypes.CDLL(None).madvise(address, length, advice) if taken else -1

    monkeypatch.setattr(limits, "_libc", Libc)
    size = 32 << 20  # see docs/performance.md
    large = torch.zeros(size, dtype=torch.float8_e5m2)
    result = select([large])
    assert same(result, large)
    page, start = mmap.PAGESIZE, result.data_ptr()
    assert asked == [(-(-start // page) * page, size - -start % page, mmap.MADV_HUGEPAGE)]
    select([large[1:]])
    assert len(asked) == 1


def test_systems_without_huge_pages_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_libc", None)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    like = torch.zeros(10)
    assert new_tensor(like, Limits(huge_pages_bytes=1)).shape == like.shape


@pytest.mark.parametrize("sub_models", [1, 16, 17, 1024])
def test_chunks_of_torch_operations_become_smaller_with_many_sub_models(sub_models: int) -> None:
    for device in ("cpu", "cuda"):
        chunk = LIMITS.chunk_of(torch.device(device), sub_models)
        assert chunk >= 1 << 13
        assert chunk * sub_models <= LIMITS.masks


def test_an_accelerator_is_given_larger_chunks() -> None:
    assert LIMITS.chunk_of(torch.device("cuda"), 1) > LIMITS.chunk_of(torch.device("cpu"), 1)


def test_a_chunk_has_an_element_at_least() -> None:
    assert Limits(masks=4).chunk_of(torch.device("cpu"), 5) == 1


def test_torch_does_not_share_an_operation_on_a_chunk_among_its_threads() -> None:
    assert LIMITS.chunk < 32_768  # GRAIN_SIZE in ATen/TensorIterator.h


# ---- which kernel


@pytest.mark.parametrize("name", ["torch", pytest.param("c", marks=compiled)])
def test_the_environment_chooses_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKIT_SELECT_KERNEL", name)
    assert kernel_name() == name


@compiled
def test_the_compiled_kernel_works_on_processors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGEKIT_SELECT_KERNEL", raising=False)
    devices = []
    monkeypatch.setattr(kernel_c, "merge", lambda _selection, out, _limits: devices.append(out.device.type))
    select([torch.zeros(3)])
    assert select([torch.zeros(3, device="meta")]).device.type == "meta"
    assert devices == ["cpu"]


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKIT_SELECT_KERNEL", "cuda")
    with pytest.raises(ParameterError) as raised:
        select([torch.zeros(1)])
    message = "MERGEKIT_SELECT_KERNEL must be c or torch, got 'cuda'; leave it unset to use the faster one"
    assert str(raised.value) == message


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder where the library is looked for, with nothing found so far."""
    monkeypatch.setattr(kernel_c, "LIBRARY", tmp_path / kernel_c.LIBRARY.name)
    kernel_c.library.cache_clear()
    yield kernel_c.LIBRARY
    kernel_c.library.cache_clear()


def test_without_a_library_torch_merges(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGEKIT_SELECT_KERNEL", raising=False)
    assert kernel_name() == "torch"
    assert same(select([torch.ones(3)]), torch.ones(3))


def test_without_a_library_the_compiled_kernel_cannot_be_asked_for(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKIT_SELECT_KERNEL", "c")
    with pytest.raises(ParameterError) as raised:
        select([torch.zeros(1)])
    message = (
        f"MERGEKIT_SELECT_KERNEL is c, but this installation has no compiled kernel in {installed}; install the "
        f"package again where there is a C compiler, or unset the variable"
    )
    assert str(raised.value) == message


def test_a_library_that_cannot_be_loaded_is_named_and_torch_merges(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MERGEKIT_SELECT_KERNEL", raising=False)
    installed.write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="cannot be used, and torch's operations merge instead: "):
        assert kernel_name() == "torch"


@compiled
def test_a_library_of_another_source_is_named_and_torch_merges(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGEKIT_SELECT_KERNEL", raising=False)
    shutil.copy(Path(kernel_c.__file__).with_name(installed.name), installed)
    assert kernel_name() == "c"
    kernel_c.library.cache_clear()
    installed.with_name("kernel.c").write_text("int changed;")
    with pytest.warns(UserWarning, match="it was built from another kernel.c than the one beside it; install"):
        assert kernel_name() == "torch"
