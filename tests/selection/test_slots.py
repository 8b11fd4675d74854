"""Weights to slots and thresholds: the reference, the laws of the specification, and its errors."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mergekit_select.errors import ParameterError
from mergekit_select.selection.slots import slots, thresholds
from tests import reference

WEIGHTS = st.lists(
    st.one_of(
        st.just(0.0),
        st.integers(1, 5).map(float),
        st.floats(0, 1e6, allow_subnormal=True),
        st.floats(1e-300, 1e300),
    ),
    min_size=1,
    max_size=12,
).filter(any)


@settings(deadline=None)
@given(WEIGHTS)
@example([5e-324, 1.7976931348623157e308])
@example([1.0] * 1024)
@example([1e-9] * 1023 + [1.0])
@example([0.1, 0.2, 0.7])
def test_slots_are_those_of_the_reference(weights: Any) -> None:
    assert list(slots(weights)) == reference.slots(weights)


@settings(deadline=None)
@given(WEIGHTS)
def test_a_positive_weight_keeps_a_slot_and_zero_none(weights: Any) -> None:
    counts = slots(weights)
    assert [count > 0 for count in counts] == [weight > 0 for weight in weights]
    assert 1 <= sum(counts) <= 2**16 - 1


@settings(deadline=None)
@given(WEIGHTS)
def test_realised_probabilities_are_within_2_to_the_minus_15(weights: Any) -> None:
    exact = [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    assume(all(p == 0 or p >= Fraction(1, 2**14) for p in exact))  # less keeps one slot at others' expense
    counts = slots(weights)
    drawable = [k for k, count in enumerate(counts) if count]
    edges = [0, *thresholds([counts[k] for k in drawable]), 2**16]
    for k, low, high in zip(drawable, edges[:-1], edges[1:], strict=True):
        assert abs(Fraction(high - low, 2**16) - exact[k]) < Fraction(1, 2**15)


@given(st.integers(1, 40), st.floats(1e-300, 1e300))
def test_equal_weights_of_any_size_are_one_slot_each(count: int, weight: Any) -> None:
    assert slots([weight] * count) == (1,) * count


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(-60, 60))
def test_scaling_by_a_power_of_two_changes_nothing(weights: Any, power: int) -> None:
    assert slots([w * 2.0**power for w in weights]) == slots(weights)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=60), st.integers(0, 2**16 - 1))
def test_thresholds_choose_as_the_definition_says(counts: list[int], u: int) -> None:
    by_threshold = next((k for k, t in enumerate(thresholds(counts)) if u < t), len(counts) - 1)
    assert by_threshold == reference.choose(u, counts, set(range(len(counts))))


@given(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 900)), min_size=2, max_size=60))
@example([1, 1])  # a threshold that is no fraction: the draw that equals it falls behind
def test_the_draws_on_both_sides_of_a_threshold_fall_as_the_definition_says(counts: list[int]) -> None:
    everyone = set(range(len(counts)))
    for k, threshold in enumerate(thresholds(counts)):
        assert reference.choose(threshold - 1, counts, everyone) <= k < reference.choose(threshold, counts, everyone)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5], "weight must be a finite number of at least 0, got -0.5 for sub-model 1"),
        ([float("nan")], "weight must be a finite number of at least 0, got nan for sub-model 0"),
        ([1.0, float("inf")], "weight must be a finite number of at least 0, got inf for sub-model 1"),
        (
            [0.0, 0.0],
            "the weights of the 2 sub-models that have the tensor are all 0; make one of them positive",
        ),
        ([1.0] * 1025, "at most 1024 sub-models can be merged at once, got 1025; merge them in groups"),
    ],
)
def test_what_is_refused(weights: Any, message: str) -> None:
    with pytest.raises(ParameterError) as raised:
        slots(weights)
    assert str(raised.value) == message
