"""Count one tensor, a chunk at a time: what stayed as the base has it, and what was drawn from where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import torch

from mergekit_select.bits import integers
from mergekit_select.inspection.tally import Tally, pair_count
from mergekit_select.planner.together import threads
from mergekit_select.selection import Drawn

_CHUNK = 1 << 17  # elements counted at once, so that masks stay in the cache


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
    # A chunk takes dozens of operations of some microseconds. With other processes on the same cores, sharing each of
    # them among threads took ten times as long as one thread.
    with threads(1):
        for start, stop, drawn in _chunks(size, draws):
            part = {k: value[start:stop] for k, value in values.items()}
            bits = {k: integers(value) for k, value in part.items()}
            equal = {}
            if base_values is not None:
                equal = counts.add_base(part, bits, base_values[start:stop], expected)
            counts.addpair_count(bits)
            if drawn is not None:
                counts.add_draws(present, drawn, equal)
    variances = [0.0] * len(tensors)
    means = [0.0] * len(tensors)
    for k, probability in zip(present, probabilities, strict=False):
        means[k], variances[k] = size * probability, size * probability * (1 - probability)
    compared = tuple(size if k in values and base is not None else 0 for k in range(len(tensors)))
    pairs = combinations(range(len(tensors)), 2) if pair_count(len(tensors)) else ()
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


def _chunks(size: int, draws: Iterable[Drawn] | None) -> Iterator[tuple[int, int, Drawn | None]]:
    if draws is None:
        for start in range(0, size, _CHUNK):
            yield start, min(start + _CHUNK, size), None
        return
    for drawn in draws:
        yield drawn.start, drawn.start + len(drawn.first), drawn


def _ones(mask: torch.Tensor) -> int:
    return int(torch.count_nonzero(mask))


class _Counts:
    """The counts of one tensor while its chunks go by."""

    def __init__(self, sub_models: int):
        self.unchanged = [0] * sub_models
        self.unchanged_all = 0
        self.squares = [0.0] * sub_models
        self.base_square = 0.0
        self.agreeing = [0] * pair_count(sub_models)
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
        base_integers, origin = integers(base), base.double()
        self.base_square += float(torch.dot(origin, origin))
        equal = {k: torch.eq(bits[k], base_integers) for k in bits}
        for k, value in values.items():
            self.unchanged[k] += _ones(equal[k])
            vector = value.double().sub_(origin)
            self.squares[k] += float(torch.dot(vector, vector))
        if len(equal) == expected and equal:
            everywhere, *others = equal.values()
            everywhere = everywhere.clone()
            for mask in others:
                everywhere &= mask
            self.unchanged_all += _ones(everywhere)
        return equal

    def addpair_count(self, bits: dict[int, torch.Tensor]) -> None:
        """Compare the sub-models with each other."""
        for pair, (i, j) in enumerate(self._pairs):
            if i in bits and j in bits:
                self.agreeing[pair] += _ones(torch.eq(bits[i], bits[j]))

    def add_draws(self, present: Sequence[int], drawn: Drawn, equal: dict[int, torch.Tensor]) -> None:
        """Count where the elements come from."""
        first, chosen = drawn.first.cpu(), drawn.chosen.cpu()
        self.left += _ones(chosen < 0)
        for position, k in enumerate(present):
            mine = torch.eq(first, position)
            self.first[k] += _ones(mine)
            self.chosen[k] += _ones(torch.eq(chosen, position))
            if k in equal:
                self.redrawn[k] += _ones(mine & equal[k])
