"""Selection and resampling: the slow reference, and the laws that hold whatever the implementation."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from mergekit_select import (
    drawn,
    resample,
    select,
    selection_plan,
    selection_scratch,
    selection_threads,
    selection_worker,
)
from mergekit_select.errors import ParameterError, TensorError, UnsupportedDtypeError
from mergekit_select.selection_scratch import Scratch

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_bits(shape, dtype, generator_seed, distinct=None):
    """A tensor of any bits at all: NaN payloads, infinities, negative zeros and subnormals among them."""
    generator = torch.Generator().manual_seed(generator_seed)
    element = INTEGERS[dtype.itemsize]
    if distinct is None:
        flat = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        return flat.view(element).view(dtype).view(shape)
    values = random_bits((distinct,), dtype, 99)
    return bits(values)[torch.randint(0, distinct, shape, generator=generator)].view(dtype)


def inputs(count, shape, dtype, distinct=3):
    """Sub-models and a base that agree often."""
    tensors = [random_bits(shape, dtype, k + 1, distinct) for k in range(count)]
    return tensors, random_bits(shape, dtype, 0, distinct)


WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(0.001, 10), st.integers(1, 3)), min_size=1, max_size=6).filter(any)
ROUNDS = st.one_of(st.none(), st.integers(1, 7))


@settings(max_examples=150, deadline=None)
@given(
    WEIGHTS,
    st.sampled_from(DTYPES),
    st.one_of(st.none(), st.just(True)),
    ROUNDS,
    st.integers(0, 2**63 - 1),
    st.text(max_size=5),
    st.integers(0, 60),
    st.sampled_from([8, 12, 1 << 17]),
)
def test_results_and_origins_are_those_of_the_reference(weights, dtype, with_base, rounds, seed, name, size, chunk):
    tensors, base = inputs(len(weights), (size,), dtype)
    options = dict(weights=weights, seed=seed, name=name)
    original = selection_threads._CHUNK_CPU
    selection_threads._CHUNK_CPU = chunk
    try:
        if with_base:
            options["rounds"] = rounds
            merged = resample(tensors, base, **options)
            origins = list(drawn(tensors, base, **options))
        else:
            merged = select(tensors, **options)
            origins = list(drawn(tensors, **options))
    finally:
        selection_threads._CHUNK_CPU = original
    expected, first, chosen = reference.merge(
        [bits(t).tolist() for t in tensors], bits(base).tolist() if with_base else None, **options
    )
    assert bits(merged).tolist() == expected
    assert [k for origin in origins for k in origin.first.tolist()] == first
    assert [k for origin in origins for k in origin.chosen.tolist()] == chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [None, 1, 2])
def test_large_sums_of_slots_give_the_right_result(dtype, rounds):
    weights = [0.7, 0.1, 0.15, 0.05]  # 65,535 slots in all, 45,874 of the first
    tensors, base = inputs(4, (300,), dtype, distinct=2)
    merged = resample(tensors, base, weights=weights, rounds=rounds)
    expected, _, _ = reference.merge(
        [bits(t).tolist() for t in tensors], bits(base).tolist(), weights=weights, rounds=rounds
    )
    assert bits(merged).tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 3, 64, 300, 1024])
@pytest.mark.parametrize("rounds", [None, 1, 5])
def test_many_sub_models(count, rounds):
    tensors, base = inputs(count, (50,), torch.bfloat16)
    expected, _, _ = reference.merge([bits(t).tolist() for t in tensors], bits(base).tolist(), rounds=rounds)
    assert bits(resample(tensors, base, rounds=rounds)).tolist() == expected
    expected, _, _ = reference.merge([bits(t).tolist() for t in tensors])
    assert bits(select(tensors)).tolist() == expected


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 2),
    "sliced": lambda t: t[:, 1:, ::2],
    "column": lambda t: t[:, :, 3],
    "expanded": lambda t: t[:1, :, :1].expand(5, t.shape[1], 6),
    "offset": lambda t: t[1:],
    "flipped": lambda t: t.flip(0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk", [4, 52, 1 << 17])
def test_strides_do_not_matter(layout, dtype, chunk, monkeypatch):
    monkeypatch.setattr(selection_threads, "_CHUNK_CPU", chunk)
    tensors, base = inputs(4, (7, 8, 9), dtype)
    strided = [LAYOUTS[layout](t) for t in [*tensors, base]]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in strided]
    for mixed in (strided, [*dense[:2], *strided[2:]], [*strided[:-1], dense[-1]]):
        before = [bits(t) for t in mixed]
        assert same(select(mixed[:-1]), select(dense[:-1]))
        for rounds in (None, 1):
            found = resample(mixed[:-1], mixed[-1], rounds=rounds)
            assert found.is_contiguous()
            assert same(found, resample(dense[:-1], dense[-1], rounds=rounds))
        assert all(torch.equal(a, bits(t)) for a, t in zip(before, mixed, strict=True)), "an input was modified"


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_at_the_edge(shape, dtype):
    tensors, base = inputs(3, shape, dtype)
    expected, _, _ = reference.merge([bits(t).flatten().tolist() for t in tensors])
    merged = select(tensors)
    assert merged.shape == shape
    assert bits(merged).flatten().tolist() == expected
    for rounds in (None, 1):
        assert resample(tensors, base, rounds=rounds).shape == shape


def test_one_sub_model_is_copied():
    tensor = random_bits((40, 50), torch.float32, 1)
    merged = select([tensor])
    assert same(merged, tensor)
    assert merged.data_ptr() != tensor.data_ptr()
    assert same(resample([tensor], random_bits((40, 50), torch.float32, 2)), tensor)


def test_results_carry_no_autograd_history_and_alias_no_input():
    tensors = [torch.randn(100, requires_grad=True) for _ in range(3)]
    for merged in (select(tensors), resample(tensors, tensors[0]), select(tensors[:1])):
        assert not merged.requires_grad
        assert merged.data_ptr() not in {t.data_ptr() for t in tensors}


def test_equality_with_the_base_is_equality_of_bits():
    negative_zero, nan = torch.tensor([-0.0]), torch.tensor([math.nan])
    assert same(resample([negative_zero], torch.tensor([0.0])), negative_zero)
    for d in drawn([nan], nan.clone()):
        assert d.chosen.tolist() == [-1]


SIZE = 3 << 17  # several chunks, several threads


@pytest.fixture(scope="module")
def large():
    """Five sub-models and a base whose values agree in independent places."""
    base = random_bits((SIZE,), torch.bfloat16, 0)
    masks = [torch.rand(SIZE, generator=torch.Generator().manual_seed(k)) < 0.4 for k in range(5)]
    tensors = [
        torch.where(mask, bits(base), bits(random_bits((SIZE,), torch.bfloat16, k + 10))).view(torch.bfloat16)
        for k, mask in enumerate(masks)
    ]
    return tensors, base


def test_every_element_stems_from_an_allowed_candidate(large):
    tensors, base = large
    weights = [1, 0, 2, 3, 0]
    allowed = torch.stack([bits(t) for t, w in zip(tensors, weights, strict=True) if w])
    merged = bits(select(tensors, weights=weights))
    assert bool((allowed == merged).any(0).all())
    merged = bits(resample(tensors, base, weights=weights))
    assert bool(((allowed == merged).any(0) | (merged == bits(base))).all())


def chi_square(observed, probabilities):
    total = sum(observed)
    return sum((o - total * p) ** 2 / (total * p) for o, p in zip(observed, probabilities, strict=True) if p)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [1, 2, 3, 4, 5], [0.3, 0, 0.7, 1e-2, 4]])
def test_frequencies_follow_the_weights(weights):
    tags = [torch.full((SIZE,), float(k)) for k in range(5)]
    observed = torch.bincount(select(tags, weights=weights, seed=3).long(), minlength=5).tolist()
    assert [o == 0 for o in observed] == [w == 0 for w in weights]
    # 4 degrees of freedom at most: 33 is exceeded once in a million
    assert chi_square(observed, [w / sum(weights) for w in weights]) < 33


def test_frequencies_among_those_that_differ_follow_the_weights(large):
    tensors, base = large
    weights = [1, 2, 3, 4, 5]
    differ = torch.stack([bits(t) != bits(base) for t in tensors])
    chosen = torch.cat([d.chosen for d in drawn(tensors, base, weights=weights, seed=3)])
    for pattern in itertools.product([False, True], repeat=5):
        here = (differ == torch.tensor(pattern)[:, None]).all(0)
        observed = torch.bincount(chosen[here].long() + 1, minlength=6).tolist()
        if not any(pattern):
            assert observed[0] == here.sum()
            continue
        kept = [w * p for w, p in zip(weights, pattern, strict=True)]
        assert all(o == 0 for o, p in zip(observed, [False, *pattern], strict=True) if not p)
        assert chi_square(observed[1:], [w / sum(kept) for w in kept]) < 33


def test_no_element_equals_the_base_where_a_sub_model_of_positive_weight_differs(large):
    tensors, base = large
    merged = bits(resample(tensors, base, weights=[1, 0, 1, 1, 0]))
    differs = torch.stack([bits(tensors[k]) != bits(base) for k in (0, 2, 3)]).any(0)
    assert torch.equal(merged != bits(base), differs)


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 9])
def test_the_share_left_at_the_base_is_that_of_drawing_without_replacement(large, rounds):
    tensors, base = large
    left = float((bits(resample(tensors, base, rounds=rounds, seed=1)) == bits(base)).double().mean())
    expected = 0.4 ** min(rounds + 1, 5)
    assert abs(left - expected) < 4.5 * (expected * (1 - expected) / SIZE) ** 0.5

    # element by element: of those with u unchanged sub-models, C(u, n + 1) / C(5, n + 1) stay
    unchanged = torch.stack([bits(t) == bits(base) for t in tensors]).sum(0)
    stays = bits(resample(tensors, base, rounds=rounds, seed=1)) == bits(base)
    for u in range(6):
        here = unchanged == u
        p = math.comb(u, min(rounds + 1, 5)) / math.comb(5, min(rounds + 1, 5))
        error = (p * (1 - p) / int(here.sum())) ** 0.5
        assert abs(float(stays[here].double().mean()) - p) <= 4.5 * error


def test_redrawing_changes_only_what_equals_the_base(large):
    tensors, base = large
    selected, redrawn = bits(select(tensors, seed=8)), bits(resample(tensors, base, rounds=1, seed=8))
    unchanged = selected == bits(base)
    assert torch.equal(selected[~unchanged], redrawn[~unchanged])
    assert float((redrawn[unchanged] != bits(base)[unchanged]).double().mean()) > 0.5


def test_rounds_of_all_alternatives_give_the_bits_of_no_rounds(large):
    tensors, base = large
    unlimited = resample(tensors, base)
    for rounds in (4, 5, 1000):
        assert same(resample(tensors, base, rounds=rounds), unlimited)
    weights = [1, 0, 2, 1, 0]
    assert same(resample(tensors, base, weights=weights, rounds=2), resample(tensors, base, weights=weights))


def test_where_all_differ_resampling_is_selection(large):
    tensors, base = large
    differ = torch.stack([bits(t) != bits(base) for t in tensors]).all(0)
    selected = bits(select(tensors, seed=6))
    for rounds in (None, 1, 2):
        assert torch.equal(bits(resample(tensors, base, rounds=rounds, seed=6))[differ], selected[differ])


def test_permuting_models_of_equal_weight_permutes_candidates_and_leaves_draws(large):
    tensors, _ = large
    order = [3, 1, 4, 0, 2]
    first = torch.cat([d.chosen for d in drawn(tensors)])
    second = torch.cat([d.chosen for d in drawn([tensors[k] for k in order])])
    assert torch.equal(first, second)
    stacked = torch.stack([bits(tensors[k]) for k in order])
    assert torch.equal(bits(select([tensors[k] for k in order])), stacked.gather(0, first.long()[None])[0])


def test_identical_models_merge_to_that_model(large):
    tensors, base = large
    assert same(select([tensors[0]] * 7, weights=[1, 2, 3, 4, 5, 6, 7]), tensors[0])
    assert same(resample([tensors[0]] * 3, base), tensors[0])
    assert same(resample([base] * 3, base, rounds=1), base)


@pytest.mark.parametrize("scale", [1e-200, 0.1, 3.0, 1e200])
def test_the_size_of_equal_weights_and_powers_of_two_change_no_bit(large, scale):
    tensors, base = large
    assert same(select(tensors, weights=[scale] * 5), select(tensors))
    weights = [0.1, 0.2, 0.3, 0.25, 0.15]
    scaled = [w * 2.0**12 for w in weights]
    assert same(resample(tensors, base, weights=scaled), resample(tensors, base, weights=weights))


@pytest.mark.parametrize("rounds", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_chunks_change_no_bit(dtype, rounds, monkeypatch):
    for bound in ("_HANDED_FROM", "_SHARED_FROM"):
        monkeypatch.setattr(selection_threads, bound, 4000)
    tensors, base = inputs(5, (3 * 2**17 + 7,), dtype)
    threads = torch.get_num_threads()
    expected = select(tensors), resample(tensors, base, rounds=rounds)
    for chunk, number in [(1 << 17, 1), (1 << 14, 1), (1 << 14, 3), (12, 2), (4100, 5)]:
        if chunk == 12:
            tensors, base = [t[:5000] for t in tensors], base[:5000]
            expected = tuple(t[:5000] for t in expected)
        monkeypatch.setattr(selection_threads, "_CHUNK_CPU", chunk)
        torch.set_num_threads(number)
        try:
            found = select(tensors), resample(tensors, base, rounds=rounds)
            assert torch.get_num_threads() == number
        finally:
            torch.set_num_threads(threads)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_threads_started_later_use_as_many_threads_as_before(large):
    torch.set_num_threads(2)
    selection_threads.pool.cache_clear()
    select(large[0])
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]


def test_threads_of_the_pool_run_operations_in_one_thread():
    def threads_after_an_operation():
        torch.zeros(1)
        return torch.get_num_threads()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    selection_threads.pool.cache_clear()
    try:
        pool = selection_threads.pool(2)
        assert {pool.submit(threads_after_an_operation).result() for _ in range(8)} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        selection_threads.pool.cache_clear()


def test_sizes_decide_who_merges():
    tensor, threads = torch.empty(1, dtype=torch.bfloat16), torch.get_num_threads()
    shared = []
    torch.set_num_threads(2)
    try:
        for size in (1, 2**17 - 1, 2**17, 2**20 - 1, 2**20, 2**32):
            plan = selection_plan.make_plan([tensor.expand(size)] * 3, None, None, None, 0, "")
            shared.append(selection_threads.share(plan)[1])
    finally:
        torch.set_num_threads(threads)
    assert shared == [0, 0, 1, 1, 2, 2]


def test_memory_kept_from_one_merge_to_the_next_changes_no_bit(large):
    """Nor does inference mode, whose tensors could not be written to outside it, such as in threads of the pool."""
    tensors, base = large
    wide = [t.double() for t in tensors]
    expected = select(tensors), select(wide), resample(tensors, base, rounds=2)
    with torch.inference_mode():
        found = select(tensors), select(wide), resample(tensors, base, rounds=2)
    assert all(same(a, b.clone()) for a, b in zip(expected, found, strict=True))
    small = [t[:1000] for t in tensors]
    with torch.inference_mode():
        inside = select(small)
    assert same(select(small), inside.clone())


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has huge pages to ask for")
def test_huge_pages_are_asked_for_large_results_alone(taken, monkeypatch):
    asked = []

    class Libc:
        def madvise(self, address, length, advice):
            asked.append((address.value, length.value, advice))
            return ctypes.CDLL(None).madvise(address, length, advice) if taken else -1

    monkeypatch.setattr(selection_scratch, "_libc", Libc)
    size = 1 << 25
    large = torch.zeros(size, dtype=torch.float8_e5m2)
    assert same(select([large]), large)
    result = select([large])
    page, start = mmap.PAGESIZE, result.data_ptr()
    assert asked[-1] == (-(-start // page) * page, size - -start % page, mmap.MADV_HUGEPAGE)
    assert len(asked) == 2
    select([large[1:]])
    assert len(asked) == 2


def test_systems_without_huge_pages_are_not_asked(monkeypatch):
    monkeypatch.setattr(selection_scratch, "_HUGE_FROM", 1)
    monkeypatch.setattr(selection_scratch, "_libc", None)
    monkeypatch.delattr(selection_scratch.mmap, "MADV_HUGEPAGE", raising=False)
    tensors, _ = inputs(1, (100,), torch.bfloat16)
    assert same(select(tensors), tensors[0])


@pytest.mark.parametrize("count", [3, 15])
def test_equal_slots_need_not_be_one(count):
    """Weights that differ by less than a slot get equal slots, of which many are left after a draw, not one a model."""
    weights = [1 + 2**-45 * (k % 3) for k in range(count)]
    assert len(set(reference.slots(weights))) == 1
    tensors, base = inputs(count, (400,), torch.bfloat16)
    expected = reference.merge(
        [bits(t).tolist() for t in tensors], bits(base).tolist(), weights=weights, rounds=1, name="x"
    )
    assert bits(resample(tensors, base, weights=weights, rounds=1, name="x")).tolist() == expected[0]


def test_origins_may_be_asked_for_between_merges(large, monkeypatch):
    monkeypatch.setattr(selection_threads, "_CHUNK_CPU", 1 << 12)
    tensors = [t[:20_000] for t in large[0]]
    expected = [origin.chosen for origin in drawn(tensors)]
    found = []
    for one, other in zip(drawn(tensors), drawn(tensors, large[1][:20_000], rounds=1), strict=True):
        select(tensors, seed=1)
        assert one.start == other.start
        found.append(one.chosen)
    assert len(found) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("threads", "kept"), [(1, True), (2, True), (3, True), (64, False)])
@pytest.mark.parametrize(("sub_models", "rounds"), [(4, 1), (8, None)])  # whose buffers are as large as any
def test_no_more_memory_is_kept_than_its_budget(threads, kept, sub_models, rounds, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(selection_threads, "_kept", threading.local())
    tensor = torch.empty(2**22, dtype=torch.bfloat16)
    plan = selection_plan.make_plan([tensor] * sub_models, tensor, None, rounds, 0, "")
    with selection_threads.scratch(tensor.device, threads) as memory:
        selection_worker.Worker(plan, selection_threads.share(plan)[0], memory)
    assert memory.bytes() >= 8 * 2**20
    with selection_threads.scratch(tensor.device, threads) as following:
        assert (following is memory) == kept
    assert following.bytes() * threads <= 25 * 2**20


def test_an_error_in_a_thread_is_raised_and_ends_the_others(large, monkeypatch):
    def fail(*_args):
        raise MemoryError("no room")

    monkeypatch.setattr(selection_worker.Worker, "merge", fail)
    with pytest.raises(MemoryError, match="no room"):
        select(large[0])


@pytest.mark.parametrize("sub_models", [2, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float64])
@pytest.mark.parametrize("rounds", [None, 1])
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_buffers_stay_within_their_budget(sub_models, dtype, rounds, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensor = torch.empty(1, dtype=dtype).expand(2**32)
    plan = selection_plan.make_plan([tensor] * sub_models, tensor, None, rounds, 0, "")
    chunk, shared_by = selection_threads.share(plan)
    buffers = selection_worker.Buffers(plan, chunk, Scratch(tensor.device))
    tensors = [*vars(buffers).values(), *vars(buffers.stream).values(), *buffers.masks]
    tensors += [*buffers.strided, *buffers.reach]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if hasattr(t, "numel")}
    assert sum(storages.values()) * max(1, shared_by) <= 64 * 2**20


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda t: select([]), TensorError, "selection needs the tensor of at least one sub-model, got none"),
        (
            lambda t: select([t, t[:3]]),
            TensorError,
            "all inputs of a selection must have the same shape: tensor 1 has (3,), tensor 0 (4,); align them before",
        ),
        (
            lambda t: resample([t, t], t.double()),
            TensorError,
            "all inputs of a selection must have the same dtype: the base has torch.float64, tensor 0 torch.float32; "
            "align them before",
        ),
        (
            lambda t: select([t, t], weights=[1]),
            ParameterError,
            "weights must be one per tensor: got 1 for 2 tensors",
        ),
        (
            lambda t: resample([t], t, rounds=0),
            ParameterError,
            "rounds must be at least 1, got 0; leave it out to redraw until the value differs",
        ),
        (lambda t: select(["x"]), TensorError, "selection takes dense tensors, got str; convert it before"),
        (
            lambda t: resample([t], t.to_sparse()),
            TensorError,
            "selection takes dense tensors, got torch.sparse_coo; convert it before",
        ),
        (lambda t: select([t], seed=-1), ParameterError, "seed must be an integer in [0, 2^63), got -1"),
        (
            lambda t: select([t.int()]),
            UnsupportedDtypeError,
            "selection copies floating-point tensors of 8, 16, 32 or 64 bits, got torch.int32; copy such a tensor "
            "from one model instead",
        ),
        (
            lambda t: select([t.bool()]),
            TypeError,
            "selection copies floating-point tensors of 8, 16, 32 or 64 bits, got torch.bool; copy such a tensor "
            "from one model instead",
        ),
    ],
)
def test_what_is_refused(call, kind, message):
    with pytest.raises(kind) as raised:
        call(torch.zeros(4))
    assert str(raised.value) == message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [None, 1, 2, 3])
@pytest.mark.parametrize("weights", [None, [1, 2, 0, 0.3, 1]])
def test_an_accelerator_gives_the_same_bits(dtype, rounds, weights):
    tensors, base = inputs(5, (1001, 1003), dtype)
    on_device = [t.cuda() for t in tensors]
    assert same(select(on_device, weights=weights).cpu(), select(tensors, weights=weights))
    options = dict(weights=weights, rounds=rounds)
    found = resample(on_device, base.cuda(), **options)
    assert found.device.type == "cuda"
    assert same(found.cpu(), resample(tensors, base, **options))
    for what in ("first", "chosen"):
        here = torch.cat([getattr(origin, what) for origin in drawn(tensors, base, **options)])
        there = torch.cat([getattr(origin, what) for origin in drawn(on_device, base.cuda(), **options)])
        assert torch.equal(there.cpu(), here)
