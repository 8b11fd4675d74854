"""Counts of one tensor, or of many together: what stayed as the base has it, and what was drawn from where."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

# Of more sub-models, pairs are not compared: their number grows with the square.
MOST_COMPARED_PAIRWISE = 16


@dataclass(frozen=True)
class Tally:
    """Counts of parameters; a tuple has one entry per sub-model of the report, in recipe order.

    Tallies of different tensors add up.

    Attributes:
        tensors: How many tensors.
        parameters: How many elements these have.
        held: Of these, in tensors that the sub-model has.
        compared: Of these, in tensors that the base has too.
        unchanged: Of the compared, those with the base's bits.
        compared_all: Of those compared for any sub-model, in tensors that base and all sub-models of the slice have.
        unchanged_all: Of these, those with the base's bits in every sub-model.
        squared_norms: Squared Euclidean norm of the task vector (sub-model minus base), over the compared.
        base_squared_norms: The base's own, over the same.
        pairs_held: Parameters that both sub-models of a pair have; pairs as ``itertools.combinations`` lists them.
        pairs_agreeing: Of these, those with equal bits.
        drawn: Parameters drawn among the sub-models; the others are copied, or the method does not draw.
        expected: First draws to be expected from the weights.
        variance: Their variance.
        first: First draws.
        redrawn: Of the first draws, those that equal the base, where resampling draws again.
        chosen: Parameters copied from the sub-model in the end.
        left: Parameters left at the base in the end.
    """

    tensors: int
    parameters: int
    held: tuple[int, ...]
    compared: tuple[int, ...]
    unchanged: tuple[int, ...]
    compared_all: int
    unchanged_all: int
    squared_norms: tuple[float, ...]
    base_squared_norms: tuple[float, ...]
    pairs_held: tuple[int, ...]
    pairs_agreeing: tuple[int, ...]
    drawn: int
    expected: tuple[float, ...]
    variance: tuple[float, ...]
    first: tuple[int, ...]
    redrawn: tuple[int, ...]
    chosen: tuple[int, ...]
    left: int

    def __add__(self, other: Tally) -> Tally:
        def add(a: Any, b: Any) -> Any:
            return tuple(x + y for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a + b

        names = [field.name for field in fields(self)]
        return Tally(**{name: add(getattr(self, name), getattr(other, name)) for name in names})

    @property
    def unchanged_shares(self) -> tuple[float | None, ...]:
        """Share of each sub-model's parameters that have the base's bits; None where nothing was compared."""
        return tuple(map(ratio, self.unchanged, self.compared))

    @property
    def unchanged_share(self) -> float | None:
        """The same over all sub-models."""
        return ratio(sum(self.unchanged), sum(self.compared))

    @property
    def unchanged_all_share(self) -> float | None:
        """Share of the parameters that have the base's bits in every sub-model: nothing can replace them."""
        return ratio(self.unchanged_all, self.compared_all)

    @property
    def agreement(self) -> tuple[float | None, ...]:
        """Share of parameters with equal bits, per pair of sub-models."""
        return tuple(map(ratio, self.pairs_agreeing, self.pairs_held))

    @property
    def norms(self) -> tuple[float | None, ...]:
        """Euclidean norm of each task vector; None where nothing was compared."""
        return tuple(
            math.sqrt(square) if count else None
            for square, count in zip(self.squared_norms, self.compared, strict=True)
        )

    @property
    def relative_norms(self) -> tuple[float | None, ...]:
        """The same, divided by the base's norm over the same parameters."""
        return tuple(
            math.sqrt(square / base) if base else None
            for square, base in zip(self.squared_norms, self.base_squared_norms, strict=True)
        )

    @property
    def deviations(self) -> tuple[float | None, ...]:
        """First draws less those expected, in standard deviations."""
        return tuple(
            (count - mean) / math.sqrt(variance) if variance else None
            for count, mean, variance in zip(self.first, self.expected, self.variance, strict=True)
        )

    def drawn_share(self, count: float) -> float | None:
        """Return a count as a share of the parameters drawn; None where none were."""
        return ratio(count, self.drawn)


def ratio(count: float, whole: float) -> float | None:
    """Return count / whole; None where there is no whole."""
    return count / whole if whole else None


def empty(sub_models: int) -> Tally:
    """Return the tally of no tensor."""
    zeros, pairs = (0,) * sub_models, (0,) * pair_count(sub_models)
    return Tally(
        tensors=0,
        parameters=0,
        held=zeros,
        compared=zeros,
        unchanged=zeros,
        compared_all=0,
        unchanged_all=0,
        squared_norms=(0.0,) * sub_models,
        base_squared_norms=(0.0,) * sub_models,
        pairs_held=pairs,
        pairs_agreeing=pairs,
        drawn=0,
        expected=(0.0,) * sub_models,
        variance=(0.0,) * sub_models,
        first=zeros,
        redrawn=zeros,
        chosen=zeros,
        left=0,
    )


def pair_count(sub_models: int) -> int:
    """Return how many pairs of sub-models are compared."""
    return sub_models * (sub_models - 1) // 2 if sub_models <= MOST_COMPARED_PAIRWISE else 0
