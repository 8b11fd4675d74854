"""Weights to whole slots and thresholds, in exact rationals, so that equal weights of any size give the same bits.

Part of the draws' specification, ``docs/draws.md``; frozen with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from mergekit_select.errors import ParameterError
from mergekit_select.selection.draws import BITS

MOST_SUB_MODELS = 1024
MOST_SLOTS = (1 << BITS) - 1


def slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the whole numbers of slots that stand for the weights.

    They are the weights themselves, reduced to coprime integers, where these sum to at most 2^16 - 1. Otherwise
    2^16 - 1 slots are apportioned by largest remainder, the earlier of two equal remainders first; a positive weight
    that is worth less than one slot keeps one, and the others divide the rest.

    Args:
        weights: Relative selection probabilities in recipe order, finite, at least 0, with a positive sum.

    Raises:
        ParameterError: A weight is negative or not finite, all are 0, or there are more than 1,024.
    """
    return _slots(tuple(float(weight) for weight in weights))


@lru_cache(maxsize=256)
def _slots(weights: tuple[float, ...]) -> tuple[int, ...]:
    if len(weights) > MOST_SUB_MODELS:
        raise ParameterError(
            f"at most {MOST_SUB_MODELS} sub-models can be merged at once, got {len(weights)}; merge them in groups"
        )
    for position, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ParameterError(f"weight must be a finite number of at least 0, got {weight} for sub-model {position}")
    # Floats are dyadic rationals, so this is exact.
    exact = [Fraction(weight) for weight in weights]
    if not any(exact):
        raise ParameterError(
            f"the weights of the {len(weights)} sub-models that have the tensor are all 0; make one of them positive"
        )
    denominator = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * denominator) for share in exact]
    divisor = math.gcd(*whole)
    whole = [count // divisor for count in whole]
    return tuple(whole) if sum(whole) <= MOST_SLOTS else _apportion(whole)


def _apportion(whole: list[int]) -> tuple[int, ...]:
    """Divide 2^16 - 1 slots among positive integers by largest remainder, none of them getting 0."""
    result = [0] * len(whole)
    sharing = [k for k, count in enumerate(whole) if count > 0]
    left = MOST_SLOTS
    while True:
        total = sum(whole[k] for k in sharing)
        below_one = [k for k in sharing if whole[k] * left < total]
        if not below_one:
            break
        for k in below_one:
            result[k] = 1
        left -= len(below_one)
        sharing = [k for k in sharing if result[k] == 0]
    for k in sharing:
        result[k] = whole[k] * left // total
    short = left - sum(result[k] for k in sharing)
    by_remainder = sorted(sharing, key=lambda k: (-(whole[k] * left % total), k))
    for k in by_remainder[:short]:
        result[k] += 1
    return tuple(result)


def thresholds(counts: Sequence[int]) -> tuple[int, ...]:
    """Return, for each sub-model but the last, the smallest draw that falls behind it.

    A draw u in [0, 2^16) selects the first sub-model whose slots, added to those before it, exceed u * N / 2^16
    rounded down, N being the sum of all slots; that is the first whose threshold exceeds u, and the last if none does.

    Args:
        counts: Slots of each sub-model in recipe order, each at least 1.
    """
    total = sum(counts)
    reached = 0
    result = []
    for count in counts[:-1]:
        reached += count
        result.append(-(-(reached << BITS) // total))
    return tuple(result)
