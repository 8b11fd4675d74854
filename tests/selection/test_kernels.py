"""Both kernels: the bits of the reference for every dtype, layout, length and place, and no byte beyond an end."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_select.selection import kernel_c, kernel_name
from mergekit_select.selection.limits import Limits
from mergekit_select.selection.merge import merge, trace
from mergekit_select.selection.plan import Selection, make_selection
from tests import reference
from tests.selection import random_configurations
from tests.selection.selection_inputs import DTYPES, KERNELS, bits, expected, guarded, inputs, random_bits, same

BLOCK = 256  # of kernel.c
WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(0.001, 10), st.integers(1, 3)), min_size=1, max_size=6).filter(any)
ROUNDS = st.one_of(st.none(), st.integers(1, 7))
LENGTHS = st.one_of(st.integers(0, 60), st.integers(BLOCK - 5, BLOCK + 5), st.integers(2 * BLOCK - 5, 2 * BLOCK + 5))

compiled = pytest.mark.skipif(kernel_c.library() is None, reason="the kernel was not compiled here")


@pytest.fixture(params=[pytest.param("c", marks=compiled), "torch"])
def kernel(request: pytest.FixtureRequest) -> Any:
    return KERNELS[request.param]


def selection(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    weights: Any = None,
    rounds: int | None = None,
    seed: int = 0,
    name: str = "",
) -> Selection:
    return make_selection(tensors, base, weights, rounds, seed, name)


@compiled
def test_the_compiled_kernel_is_used_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGEKIT_SELECT_KERNEL", raising=False)
    assert kernel_name() == "c"


@pytest.mark.parametrize("which", [pytest.param("c", marks=compiled), "torch"])
@settings(max_examples=150, deadline=None)
@given(
    WEIGHTS,
    st.sampled_from(DTYPES),
    st.booleans(),
    ROUNDS,
    st.integers(0, 2**63 - 1),
    st.text(max_size=5),
    LENGTHS,
    st.sampled_from([8, 13, 1 << 16]),
)
def test_results_and_origins_are_those_of_the_reference(
    which: str,
    weights: Any,
    dtype: torch.dtype,
    with_base: bool,
    rounds: int | None,
    seed: int,
    name: str,
    n: int,
    chunk: int,
) -> None:
    tensors, base = inputs(len(weights), (n,), dtype)
    options = dict(weights=weights, seed=seed, name=name)
    if with_base:
        options |= dict(base=base, rounds=rounds)
    chosen, kernel = selection(tensors, **options), KERNELS[which]
    limits = Limits(shared_bytes=1, part_bytes=chunk * dtype.itemsize, chunk=chunk)
    merged = merge(chosen, limits, kernel)
    origins = list(trace(chosen, limits, kernel))
    values, first, left = expected(tensors, **options)
    assert bits(merged).tolist() == values
    assert [origin.start for origin in origins] == list(range(0, n, chunk))
    assert [k for origin in origins for k in origin.first.tolist()] == first
    assert [k for origin in origins for k in origin.chosen.tolist()] == left


@compiled
@pytest.mark.parametrize("case", range(100))
def test_kernels_and_reference_agree_on_random_configurations(case: Any) -> None:
    random_configurations.check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [None, 1, 2])
@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.1, 0.15, 0.05],  # 65,535 slots in all, 45,874 of the first
        [1, 32767],  # 32,768 in all: one more than int16 holds
        [32767, 1, 32766, 1],  # 65,535 without being apportioned
        [1 + 2**-45, 1, 1, 1],  # equal slots, of which each has many
    ],
)
def test_large_sums_of_slots_give_the_right_result(
    kernel: Any, dtype: torch.dtype, rounds: int | None, weights: Any
) -> None:
    tensors, base = inputs(len(weights), (300,), dtype, distinct=2)
    found = merge(selection(tensors, base, weights, rounds), kernel=kernel)
    assert bits(found).tolist() == expected(tensors, base, weights=weights, rounds=rounds)[0]
    found = merge(selection(tensors, None, weights), kernel=kernel)
    assert bits(found).tolist() == expected(tensors, weights=weights)[0]


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 64, 300, 1024])
@pytest.mark.parametrize("rounds", [None, 1, 5, 20])
def test_many_sub_models(kernel: Any, count: int, rounds: int | None) -> None:
    tensors, base = inputs(count, (50,), torch.bfloat16)
    found = merge(selection(tensors, base, rounds=rounds), kernel=kernel)
    assert bits(found).tolist() == expected(tensors, base, rounds=rounds)[0]
    assert bits(merge(selection(tensors), kernel=kernel)).tolist() == expected(tensors)[0]


@compiled
def test_a_thousand_rounds_cross_off_a_thousand_sub_models() -> None:
    """Of 1,024 sub-models one differs from the base; where the rounds end before it is drawn, the base stays."""
    base = torch.zeros(9)
    tensors = [base] * 700 + [base + 1] + [base] * 323
    found = merge(selection(tensors, base, rounds=1000), kernel=kernel_c)
    assert bits(found).tolist() == expected(tensors, base, rounds=1000)[0]


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 2),
    "sliced": lambda t: t[:, 1:, ::2],
    "column": lambda t: t[:, :, 3],
    "rows": lambda t: t[::2, :, :7],
    "expanded": lambda t: t[:1, :, :1].expand(5, t.shape[1], 6),
    "everywhere": lambda t: t[0, 0, 0].expand(3, 1, 200),
    "offset": lambda t: t[1:],
    "axes of one": lambda t: t[:, None, ::3, :, None],
    "flipped": lambda t: t.flip(0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [4, 52, 1 << 16])
def test_strides_do_not_matter(kernel: Any, layout: str, dtype: torch.dtype, chunk: int) -> None:
    limits = Limits(shared_bytes=1, part_bytes=chunk * dtype.itemsize, chunk=chunk)
    tensors, base = inputs(4, (7, 8, 9), dtype)
    strided = [LAYOUTS[layout](t) for t in [*tensors, base]]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in strided]
    for mixed in (strided, [*dense[:2], *strided[2:]], [*strided[:-1], dense[-1]]):
        before = [bits(t).clone() for t in mixed]
        found = merge(selection(mixed[:-1]), limits, kernel)
        assert bits(found).flatten().tolist() == expected(dense[:-1])[0]
        for rounds in (None, 1):
            found = merge(selection(mixed[:-1], mixed[-1], rounds=rounds), limits, kernel)
            assert found.is_contiguous()
            assert found.shape == mixed[0].shape
            assert bits(found).flatten().tolist() == expected(dense[:-1], dense[-1], rounds=rounds)[0]
        assert all(torch.equal(a, bits(t)) for a, t in zip(before, mixed, strict=True)), "an input was modified"


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_at_the_edge(kernel: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
    tensors, base = inputs(3, shape, dtype)
    merged = merge(selection(tensors), kernel=kernel)
    assert merged.shape == shape
    assert bits(merged).flatten().tolist() == expected(tensors)[0]
    for rounds in (None, 1):
        merged = merge(selection(tensors, base, rounds=rounds), kernel=kernel)
        assert merged.shape == shape
        assert bits(merged).flatten().tolist() == expected(tensors, base, rounds=rounds)[0]
    assert sum(len(origin.chosen) for origin in trace(selection(tensors), kernel=kernel)) == merged.numel()


def test_memory_that_is_not_aligned_is_read(kernel: Any) -> None:
    """As that of a tensor in a mapped file whose header has an odd length."""
    store = random_bits((4001,), torch.float8_e5m2, 5).view(torch.uint8)
    memory = (ctypes.c_char * 4001).from_buffer(bytearray(store.numpy().tobytes()))
    shifted = [torch.frombuffer(memory, dtype=torch.float32, count=300, offset=4 * k + 1) for k in range(3)]
    assert any(t.data_ptr() % 4 for t in shifted)
    assert bits(merge(selection(shifted), kernel=kernel)).tolist() == expected([t.clone() for t in shifted])[0]


def test_a_tensor_that_stands_for_its_negative_is_read_as_what_it_stands_for(kernel: Any) -> None:
    negative = torch._neg_view(torch.arange(1.0, 9.0))
    assert negative.is_neg()
    assert same(merge(selection([negative]), kernel=kernel), -torch.arange(1.0, 9.0))


@pytest.mark.parametrize("origin", [0, 1, 3, 2**32 - 2, 2**32 + 1, 2**40 + 6])
@pytest.mark.parametrize("rounds", [None, 1])
def test_a_run_far_into_a_tensor_has_the_draws_of_its_place(kernel: Any, origin: int, rounds: int | None) -> None:
    tensors, base = inputs(3, (BLOCK + 9,), torch.bfloat16, distinct=2)
    found = merge(replace(selection(tensors, base, rounds=rounds), origin=origin), kernel=kernel)
    assert bits(found).tolist() == expected(tensors, base, rounds=rounds, start=origin)[0]


@compiled
def test_elements_beyond_2_to_the_32_are_found() -> None:
    """Of a view that repeats its rows, since memory of such a size is rarely there."""
    rows = [random_bits((1, 1 << 16), torch.bfloat16, k).expand(1 << 17, -1) for k in range(3)]
    start, count = 2**32 + 2**16 - 100, 200
    out = torch.empty(count, dtype=torch.bfloat16)
    described, _kept = kernel_c._describe(selection(rows), rows[0])
    kernel_c.function(2)(ctypes.byref(described), start, start + count, out.data_ptr())
    for d, value in enumerate(bits(out).tolist(), start):
        k = reference.choose(reference.draw(0, "", 0, d), [1, 1, 1], {0, 1, 2})
        assert value == bits(rows[k][0])[d % 2**16].item()


# ---- no byte beyond an end


needs_pages = pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")


@compiled
@needs_pages
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 31, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("count", [1, 3, 17])
def test_nothing_is_touched_before_or_after_a_buffer(dtype: torch.dtype, size: int, at_end: bool, count: int) -> None:
    tensors, base = inputs(count, (size,), dtype)
    *tensors, base = [guarded(t, at_end) for t in (*tensors, base)]
    out = guarded(torch.zeros_like(base), at_end)
    for options in ({}, {"base": base}, {"base": base, "rounds": 1}):
        kernel_c.merge(selection(tensors, **options), out, Limits(shared_bytes=1, part_bytes=100))
        assert same(out, merge(selection(tensors, **options), kernel=KERNELS["torch"]))
    if size > 4:
        rows = [t[: size // 2 * 2].view(2, -1)[:, ::2] for t in tensors]
        narrow = guarded(torch.zeros(rows[0].shape, dtype=dtype), at_end)
        kernel_c.merge(selection(rows), narrow, Limits())
        assert same(narrow, merge(selection(rows), kernel=KERNELS["torch"]))


@needs_pages
def test_a_guarded_page_is_guarded() -> None:
    """Or the test above could not fail."""
    code = """
import ctypes, sys, torch
from tests.selection.selection_inputs import guarded
tensor = guarded(torch.zeros(8), sys.argv[1] == "after")
ctypes.string_at(tensor.data_ptr() + (32 if sys.argv[1] == "after" else -1), 1)
"""
    for side in ("before", "after"):
        done = subprocess.run(
            [sys.executable, "-c", code, side],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": ""},  # no sanitizer
            capture_output=True,
        )
        assert done.returncode < 0
