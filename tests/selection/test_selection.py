"""The laws of selection and resampling, whatever the implementation, and what they refuse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from mergekit_select import drawn, resample, select
from mergekit_select.errors import ParameterError, TensorError, UnsupportedDtypeError
from tests.selection.selection_inputs import DTYPES, bits, inputs, random_bits, same

Large = tuple[list[torch.Tensor], torch.Tensor]

SIZE = 3 << 17  # several chunks, several threads


@pytest.fixture(scope="module")
def large() -> Large:
    """Five sub-models and a base whose values agree in independent places."""
    base = random_bits((SIZE,), torch.bfloat16, 0)
    masks = [torch.rand(SIZE, generator=torch.Generator().manual_seed(k)) < 0.4 for k in range(5)]
    tensors = [
        torch.where(mask, bits(base), bits(random_bits((SIZE,), torch.bfloat16, k + 10))).view(torch.bfloat16)
        for k, mask in enumerate(masks)
    ]
    return tensors, base


def test_one_sub_model_is_copied() -> None:
    tensor = random_bits((40, 50), torch.float32, 1)
    merged = select([tensor])
    assert same(merged, tensor)
    assert merged.data_ptr() != tensor.data_ptr()
    assert same(resample([tensor], random_bits((40, 50), torch.float32, 2)), tensor)


def test_results_carry_no_autograd_history_and_alias_no_input() -> None:
    tensors = [torch.randn(100, requires_grad=True) for _ in range(3)]
    for merged in (select(tensors), resample(tensors, tensors[0]), select(tensors[:1])):
        assert not merged.requires_grad
        assert merged.data_ptr() not in {t.data_ptr() for t in tensors}


def test_inference_mode_changes_no_bit() -> None:
    tensors, base = inputs(3, (1000,), torch.bfloat16)
    expected = select(tensors), resample(tensors, base, rounds=1)
    with torch.inference_mode():
        found = select(tensors), resample(tensors, base, rounds=1)
        inside = [tensor.clone() for tensor in tensors]
    assert all(same(a, b.clone()) for a, b in zip(expected, found, strict=True))
    assert same(select(inside), expected[0])


def test_equality_with_the_base_is_equality_of_bits() -> None:
    negative_zero, nan = torch.tensor([-0.0]), torch.tensor([math.nan])
    assert same(resample([negative_zero], torch.tensor([0.0])), negative_zero)
    for d in drawn([nan], nan.clone()):
        assert d.chosen.tolist() == [-1]


def test_origins_may_be_asked_for_between_merges(large: Large) -> None:
    tensors, base = ([t[:200_000] for t in large[0]], large[1][:200_000])
    expected = [origin.chosen for origin in drawn(tensors)]
    found = []
    for one, other in zip(drawn(tensors), drawn(tensors, base, rounds=1), strict=True):
        select(tensors, seed=1)
        assert one.start == other.start
        found.append(one.chosen)
    assert len(found) > 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_element_stems_from_an_allowed_candidate(large: Large) -> None:
    tensors, base = large
    weights = [1, 0, 2, 3, 0]
    allowed = torch.stack([bits(t) for t, w in zip(tensors, weights, strict=True) if w])
    merged = bits(select(tensors, weights=weights))
    assert bool((allowed == merged).any(0).all())
    merged = bits(resample(tensors, base, weights=weights))
    assert bool(((allowed == merged).any(0) | (merged == bits(base))).all())


def chi_square(observed: Sequence[float], probabilities: Sequence[float]) -> float:
    total = sum(observed)
    return sum((o - total * p) ** 2 / (total * p) for o, p in zip(observed, probabilities, strict=True) if p)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [1, 2, 3, 4, 5], [0.3, 0, 0.7, 1e-2, 4]])
def test_frequencies_follow_the_weights(weights: Any) -> None:
    tags = [torch.full((SIZE,), float(k)) for k in range(5)]
    observed = torch.bincount(select(tags, weights=weights, seed=3).long(), minlength=5).tolist()
    assert [o == 0 for o in observed] == [w == 0 for w in weights]
    # 4 degrees of freedom at most: 33 is exceeded once in a million
    assert chi_square(observed, [w / sum(weights) for w in weights]) < 33


def test_frequencies_among_those_that_differ_follow_the_weights(large: Large) -> None:
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


def test_no_element_equals_the_base_where_a_sub_model_of_positive_weight_differs(large: Large) -> None:
    tensors, base = large
    merged = bits(resample(tensors, base, weights=[1, 0, 1, 1, 0]))
    differs = torch.stack([bits(tensors[k]) != bits(base) for k in (0, 2, 3)]).any(0)
    assert torch.equal(merged != bits(base), differs)


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 9])
def test_the_share_left_at_the_base_is_that_of_drawing_without_replacement(large: Large, rounds: int) -> None:
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


def test_redrawing_changes_only_what_equals_the_base(large: Large) -> None:
    tensors, base = large
    selected, redrawn = bits(select(tensors, seed=8)), bits(resample(tensors, base, rounds=1, seed=8))
    unchanged = selected == bits(base)
    assert torch.equal(selected[~unchanged], redrawn[~unchanged])
    assert float((redrawn[unchanged] != bits(base)[unchanged]).double().mean()) > 0.5


def test_rounds_of_all_alternatives_give_the_bits_of_no_rounds(large: Large) -> None:
    tensors, base = large
    unlimited = resample(tensors, base)
    for rounds in (4, 5, 1000):
        assert same(resample(tensors, base, rounds=rounds), unlimited)
    weights = [1, 0, 2, 1, 0]
    assert same(resample(tensors, base, weights=weights, rounds=2), resample(tensors, base, weights=weights))


def test_where_all_differ_resampling_is_selection(large: Large) -> None:
    tensors, base = large
    differ = torch.stack([bits(t) != bits(base) for t in tensors]).all(0)
    selected = bits(select(tensors, seed=6))
    for rounds in (None, 1, 2):
        assert torch.equal(bits(resample(tensors, base, rounds=rounds, seed=6))[differ], selected[differ])


def test_permuting_models_of_equal_weight_permutes_candidates_and_leaves_draws(large: Large) -> None:
    tensors, _ = large
    order = [3, 1, 4, 0, 2]
    first = torch.cat([d.chosen for d in drawn(tensors)])
    second = torch.cat([d.chosen for d in drawn([tensors[k] for k in order])])
    assert torch.equal(first, second)
    stacked = torch.stack([bits(tensors[k]) for k in order])
    assert torch.equal(bits(select([tensors[k] for k in order])), stacked.gather(0, first.long()[None])[0])


def test_identical_models_merge_to_that_model(large: Large) -> None:
    tensors, base = large
    assert same(select([tensors[0]] * 7, weights=[1, 2, 3, 4, 5, 6, 7]), tensors[0])
    assert same(resample([tensors[0]] * 3, base), tensors[0])
    assert same(resample([base] * 3, base, rounds=1), base)


@pytest.mark.parametrize("scale", [1e-200, 0.1, 3.0, 1e200])
def test_the_size_of_equal_weights_and_powers_of_two_change_no_bit(large: Large, scale: float) -> None:
    tensors, base = large
    assert same(select(tensors, weights=[scale] * 5), select(tensors))
    weights = [0.1, 0.2, 0.3, 0.25, 0.15]
    scaled = [w * 2.0**12 for w in weights]
    assert same(resample(tensors, base, weights=scaled), resample(tensors, base, weights=weights))


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
            lambda t: select([t, t], weights=[1, 2, 3]),
            ParameterError,
            "weights must be one per tensor: got 3 for 2 tensors",
        ),
        (
            lambda t: resample([t], t, rounds=0),
            ParameterError,
            "rounds must be at least 1, got 0; leave it out to redraw until the value differs",
        ),
        (lambda _: select(cast(Any, ["x"])), TensorError, "selection takes dense tensors, got str; convert it before"),
        (
            lambda t: resample([t], t.to_sparse()),
            TensorError,
            "selection takes dense tensors, got torch.sparse_coo; convert it before",
        ),
        (
            lambda t: select([t] * 1025),
            ParameterError,
            "at most 1024 sub-models can be merged at once, got 1025; merge them in groups",
        ),
        (lambda t: select([t], seed=-1), ParameterError, "seed must be an integer in [0, 2^63), got -1"),
        (
            lambda t: resample([t, t], None),  # type: ignore[arg-type]
            TensorError,
            "resample needs the base's tensor, got None; to draw without one, use select",
        ),
        (lambda t: select([t, t], seed=1.0), ParameterError, "seed must be an integer in [0, 2^63), got 1.0"),  # type: ignore[arg-type]
        (lambda t: select([t, t], seed="1"), ParameterError, "seed must be an integer in [0, 2^63), got '1'"),  # type: ignore[arg-type]
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
def test_what_is_refused(call: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind) as raised:
        call(torch.zeros(4))
    assert str(raised.value) == message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds", [None, 1, 2, 3])
@pytest.mark.parametrize("weights", [None, [1, 2, 0, 0.3, 1]])
def test_an_accelerator_gives_the_same_bits(dtype: torch.dtype, rounds: int | None, weights: Any) -> None:
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
