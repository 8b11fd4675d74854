"""Counts of one tensor, or of many together: what stayed as the base has it, and what was drawn from where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import torch

from mergekit_select.selection import Drawn

# Of more sub-models, pairs are not compared: their number grows with the square.
MOST_COMPARED_PAIRWISE = 16

_CHUNK = 1 << 17
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        return tuple(map(share, self.unchanged, self.compared))

    @property
    def unchanged_share(self) -> float | None:
        """The same over all sub-models."""
        return share(sum(self.unchanged), sum(self.compared))

    @property
    def unchanged_all_share(self) -> float | None:
        """Share of the parameters that have the base's bits in every sub-model: nothing can replace them."""
        return share(self.unchanged_all, self.compared_all)

    @property
    def agreement(self) -> tuple[float | None, ...]:
        """Share of parameters with equal bits, per pair of sub-models."""
        return tuple(map(share, self.pairs_agreeing, self.pairs_held))

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
        return share(count, self.drawn)


def share(count: float, whole: float) -> float | None:
    """Return count / whole; None where there is no whole."""
    return count / whole if whole else None


def empty(sub_models: int) -> Tally:
    """Return the tally of no tensor."""
    zeros, pairs = (0,) * sub_models, (0,) * _pairs(sub_models)
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


def _pairs(sub_models: int) -> int:
    return sub_models * (sub_models - 1) // 2 if sub_models <= MOST_COMPARED_PAIRWISE else 0


def count(
    tensors: Sequence[torch.Tensor | None],
    base: torch.Tensor | None,
    *,
    expected: int,
    draws: Iterable[Drawn] | None = None,
    probabilities: Sequence[float] = (),
) -> Tally:
    """Count one tensor, a chunk at a time.

    Args:
        tensors: Per sub-model of the report; None where it has none. Equal shapes and dtypes.
        base: The base model's tensor.
        expected: How many sub-models there are to have it, so that "in every sub-model" can be said.
        draws: Where each element comes from, as positions among the tensors that are not None.
        probabilities: Of the first draw, for the same.
    """
    present = [k for k, tensor in enumerate(tensors) if tensor is not None]
    values = {k: tensor.reshape(-1) for k, tensor in enumerate(tensors) if tensor is not None}
    base_values = None if base is None else base.reshape(-1)
    size = base_values.numel() if base_values is not None else values[present[0]].numel() if present else 0
    counts = _Counts(len(tensors))
    with _one_thread():
        for start, stop, drawn in _chunks(size, draws):
            part = {k: value[start:stop] for k, value in values.items()}
            bits = {k: _bits(value) for k, value in part.items()}
            equal = {}
            if base_values is not None:
                equal = counts.add_base(part, bits, base_values[start:stop], expected)
            counts.add_pairs(bits)
            if drawn is not None:
                counts.add_draws(present, drawn, equal)
    variances = [0.0] * len(tensors)
    means = [0.0] * len(tensors)
    for k, probability in zip(present, probabilities, strict=False):
        means[k], variances[k] = size * probability, size * probability * (1 - probability)
    compared = tuple(size if k in values and base is not None else 0 for k in range(len(tensors)))
    pairs = combinations(range(len(tensors)), 2) if _pairs(len(tensors)) else ()
    return Tally(
        tensors=1,
        parameters=size,
        held=tuple(size if k in values else 0 for k in range(len(tensors))),
        compared=compared,
        unchanged=tuple(counts.unchanged),
        compared_all=size if base is not None and len(present) == expected else 0,
        unchanged_all=counts.unchanged_all,
        squared_norms=tuple(counts.squares),
        base_squared_norms=tuple(counts.base_square if part else 0.0 for part in compared),
        pairs_held=tuple(size if i in values and j in values else 0 for i, j in pairs),
        pairs_agreeing=tuple(counts.agreeing),
        drawn=size if draws is not None else 0,
        expected=tuple(means),
        variance=tuple(variances),
        first=tuple(counts.first),
        redrawn=tuple(counts.redrawn),
        chosen=tuple(counts.chosen),
        left=counts.left,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in one thread.

    A chunk takes dozens of operations of some microseconds. With other processes on the same cores, sharing each of
    them among threads took ten times as long as one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _chunks(size: int, draws: Iterable[Drawn] | None) -> Iterator[tuple[int, int, Drawn | None]]:
    if draws is None:
        for start in range(0, size, _CHUNK):
            yield start, min(start + _CHUNK, size), None
        return
    for drawn in draws:
        yield drawn.start, drawn.start + len(drawn.first), drawn


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(_INTEGERS[values.element_size()])


def _true(mask: torch.Tensor) -> int:
    return int(torch.count_nonzero(mask))


class _Counts:
    """The counts of one tensor while its chunks go by."""

    def __init__(self, sub_models: int):
        self.unchanged = [0] * sub_models
        self.unchanged_all = 0
        self.squares = [0.0] * sub_models
        self.base_square = 0.0
        self.agreeing = [0] * _pairs(sub_models)
        self.first = [0] * sub_models
        self.redrawn = [0] * sub_models
        self.chosen = [0] * sub_models
        self.left = 0
        self._pairs = [*combinations(range(sub_models), 2)] if self.agreeing else []

    def add_base(
        self,
        values: dict[int, torch.Tensor],
        bits: dict[int, torch.Tensor],
        base: torch.Tensor,
        expected: int,
    ) -> dict[int, torch.Tensor]:
        """Compare with the base; return where each sub-model equals it."""
        base_bits, origin = _bits(base), base.double()
        self.base_square += float(torch.dot(origin, origin))
        equal = {k: torch.eq(bits[k], base_bits) for k in bits}
        for k, value in values.items():
            self.unchanged[k] += _true(equal[k])
            vector = value.double().sub_(origin)
            self.squares[k] += float(torch.dot(vector, vector))
        if len(equal) == expected and equal:
            everywhere, *others = equal.values()
            everywhere = everywhere.clone()
            for mask in others:
                everywhere &= mask
            self.unchanged_all += _true(everywhere)
        return equal

    def add_pairs(self, bits: dict[int, torch.Tensor]) -> None:
        """Compare the sub-models with each other."""
        for pair, (i, j) in enumerate(self._pairs):
            if i in bits and j in bits:
                self.agreeing[pair] += _true(torch.eq(bits[i], bits[j]))

    def add_draws(self, present: Sequence[int], drawn: Drawn, equal: dict[int, torch.Tensor]) -> None:
        """Count where the elements come from."""
        first, chosen = drawn.first.cpu(), drawn.chosen.cpu()
        self.left += _true(chosen < 0)
        for position, k in enumerate(present):
            mine = torch.eq(first, position)
            self.first[k] += _true(mine)
            self.chosen[k] += _true(torch.eq(chosen, position))
            if k in equal:
                self.redrawn[k] += _true(mine & equal[k])
