"""The kernel in torch's operations: for accelerators, and for processors without the compiled one.

Elements are handled as the integers their bits are, in chunks. Each loop is that of ``kernel.c``, in torch.
"""

from __future__ import annotations

import torch

from mergekit_select.bits import integers
from mergekit_select.selection.draws import BITS, HALF, lowered_draws
from mergekit_select.selection.limits import Limits
from mergekit_select.selection.plan import Selection


@torch.no_grad()
def merge(selection: Selection, out: torch.Tensor, limits: Limits) -> None:
    """Write the merged elements to ``out``, contiguous and of the inputs' shape and dtype."""
    flat = integers(out).view(-1)
    chunk = limits.chunk_of(out.device, len(selection.tensors))
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        tensors = [read(tensor, start, start + len(part)) for tensor in selection.tensors]
        if selection.base is None:
            part.copy_(_select(selection, tensors, start))
        else:
            part.copy_(_resample(selection, tensors, read(selection.base, start, start + len(part)), start))


def read(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return the elements of row-major index ``start`` to ``stop`` as integers; copied where they are strided."""
    bits = integers(tensor)
    if bits.is_contiguous():
        return bits.view(-1)[start:stop]
    rest, places = torch.arange(start, stop, device=tensor.device), []
    for size in reversed(tensor.shape):
        places.append(rest % size)
        rest = rest // size
    return bits[tuple(reversed(places))]


def _select(selection: Selection, tensors: list[torch.Tensor], start: int) -> torch.Tensor:
    draws = _draws(selection, 0, start, tensors[0])
    chosen = tensors[-1]
    # In descending order, so that the earliest sub-model before whose end the draw falls has the final word.
    for x, end in zip(reversed(tensors[:-1]), reversed(selection.thresholds), strict=True):
        chosen = _blend(chosen, x, draws < end - HALF)
    return chosen


def _resample(selection: Selection, tensors: list[torch.Tensor], base: torch.Tensor, start: int) -> torch.Tensor:
    """Begin with the base's elements; each round replaces those that are still there."""
    chosen = base
    if selection.rounds is None:
        alternatives = [(x != base).to(torch.int32) for x in tensors]
    else:
        alternatives = [torch.ones_like(base, dtype=torch.int32) for _ in tensors]
    for draw_round, _ in enumerate(selection.keys):
        unsettled = chosen == base
        if not bool(unsettled.any()):
            break
        draws = _draws(selection, draw_round, start, base).to(torch.int64) + HALF
        total = sum(among * slots for among, slots in zip(alternatives, selection.slots, strict=True))
        target = ((draws * total) >> BITS).to(torch.int32)
        reach = torch.zeros_like(target)
        for k, (x, slots) in enumerate(zip(tensors, selection.slots, strict=True)):
            before = reach
            reach = before + alternatives[k] * slots
            here = unsettled & (before <= target) & (target < reach)
            chosen = _blend(chosen, x, here)
            alternatives[k] = alternatives[k] * ~here
    return chosen


def _blend(chosen: torch.Tensor, x: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Return x where the mask is true. torch.where takes ten times as long on processors: masks are not predictable."""
    return chosen ^ ((chosen ^ x) & here.to(x.dtype).neg_())


def _draws(selection: Selection, draw_round: int, start: int, like: torch.Tensor) -> torch.Tensor:
    first = selection.origin + start
    return lowered_draws(selection.keys[draw_round], first, first + len(like), like.device)
