"""Merge one chunk of a tensor after the other, in buffers that do not grow with it.

The elements are handled as the integers their bits are. What a draw decides is a mask of 0 and 1 for each sub-model but
the last: "where it is 1, this sub-model replaces what was chosen so far". The last one is chosen to begin with, and the
masks come in descending order, so that the earliest sub-model whose mask is 1 has the final word. Replacing is
``chosen + (candidate - chosen) * mask`` in integers that wrap around, hence exact, and runs at memory speed;
``torch.where`` on random masks mispredicts every other branch (8 times slower here, 30 times for large chunks), and
stacking the sub-models for ``gather`` is slower still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from mergekit_select.draws import BITS, DrawStream
from mergekit_select.selection_plan import HALF, Plan
from mergekit_select.selection_scratch import Scratch

# (position among the drawable sub-models, mask of 0 and 1), by descending position, the last left out
_Masks = Iterator[tuple[int, torch.Tensor]]


class Worker:
    """Merges chunk after chunk in the same buffers, which lie in the scratch memory."""

    def __init__(self, plan: Plan, length: int, scratch: Scratch):
        self.plan, self.scratch = plan, scratch
        self.fit(length)

    def fit(self, length: int) -> None:
        """Make the buffers fit chunks of this length; the last of a tensor is mostly shorter."""
        plan = self.plan
        self.buffers = Buffers(plan, length, self.scratch)
        strided = self.buffers.strided
        self.sources = [_Flat(tensor, strided[k % len(strided)]) for k, tensor in enumerate(plan.tensors)]
        self.base = None if plan.base is None else _Flat(plan.base, self.buffers.strided_base)

    def merge(self, start: int, out: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """Write the merged elements from ``start`` on to ``out``, and to ``index``, if given, where they come from.

        Args:
            start: Row-major index of the first element.
            out: Flat, of the plan's element dtype; one chunk long or less.
            index: int16, shape of ``out``; of no meaning where all sub-models drawn from equal the base.
        """
        if len(out) != self.buffers.length:
            self.fit(len(out))
        if self.base is not None and self.plan.rounds is None:
            self._reach_of_differing(start)
            self._replace(self._draw_among(0, start, self.buffers.reach[-1]), start, out, index)
            return
        self._replace(self.draw_first(start), start, out, index)
        for draw_round in range(1, 1 + (self.plan.rounds or 0)):
            if not self._redraw(draw_round, start, out, index):
                break

    def draw_first(self, start: int) -> _Masks:
        """Draw among all sub-models."""
        lanes, masks = self._read_lanes(0, start), self.buffers.masks
        for k in reversed(range(len(masks))):
            yield k, torch.lt(lanes, self.plan.thresholds[k] - HALF, out=masks[k])

    def _redraw(self, draw_round: int, start: int, out: torch.Tensor, index: torch.Tensor | None) -> bool:
        """Draw again, and take what is drawn where ``out`` equals the base; return whether it does anywhere."""
        buffers = self.buffers
        unsettled = torch.eq(out, self._read_base(start), out=buffers.unsettled)
        if not bool(unsettled.amax()):  # 15 times faster than any(), which knows booleans only
            return False
        total = self._cross_off(draw_round)
        redrawn_index = None if index is None else torch.empty_like(index)
        # All elements are drawn for, and the settled ones keep what they have: cheaper than asking at each sub-model.
        self._replace(self._draw_among(draw_round, start, total), start, buffers.redrawn, redrawn_index)
        self._blend(out, buffers.redrawn, unsettled, out)
        if index is not None and redrawn_index is not None:
            point(index, unsettled, redrawn_index)
        return True

    def _draw_among(self, draw_round: int, start: int, total: torch.Tensor | int) -> _Masks:
        """Draw for each element among its alternatives, whose slots sum to ``total``.

        Reach k is the sum of the slots of those alternatives that are sub-model k or come before it. With S the total
        and u the draw, the target is u * S / 2^16 rounded down; drawn is the first sub-model whose reach exceeds it.
        """
        buffers = self.buffers
        buffers.product.copy_(self._read_lanes(draw_round, start)).add_(HALF).mul_(total)
        target = buffers.target.copy_(buffers.product.bitwise_right_shift_(BITS))
        for k in reversed(range(len(buffers.masks))):
            yield k, torch.gt(buffers.reach[k], target, out=buffers.masks[k])

    def _reach_of_differing(self, start: int) -> None:
        """Sum the slots of the sub-models that differ from the base."""
        base, reach = self._read_base(start), self.buffers.reach
        for k, count in enumerate(self.plan.slots):
            differs = torch.ne(self._read(k, start), base, out=reach[k])
            # In place: a third buffer to write to makes an operation take a third longer.
            if k > 0:
                torch.add(reach[k - 1], differs, alpha=count, out=reach[k])
            elif count > 1:
                differs.mul_(count)

    def _cross_off(self, draw_round: int) -> torch.Tensor | int:
        """Take what was drawn last out of the alternatives: out of its own reach and the later ones.

        Returns:
            The sum of the slots that are left.
        """
        buffers, slots = self.buffers, self.plan.slots
        before: Sequence[torch.Tensor] = buffers.full_reach if draw_round == 1 else buffers.reach
        if max(slots) == 1:  # equal weights; whatever was drawn, as many are left
            for reach, mask, after in zip(before, buffers.masks, buffers.reach, strict=False):
                torch.sub(reach, mask, out=after)
            return len(slots) - draw_round
        drawn = buffers.target.fill_(slots[-1])  # the slots of the sub-model that each element has drawn
        for mask, (count, following) in zip(buffers.masks, pairwise(slots), strict=True):
            if count != following:
                drawn.add_(mask, alpha=count - following)
        for reach, mask, after in zip(before, buffers.masks, buffers.reach, strict=False):
            torch.addcmul(reach, drawn, mask, value=-1, out=after)
        return torch.sub(before[-1], drawn, out=buffers.reach[-1])

    def _read(self, k: int, start: int) -> torch.Tensor:
        return self.sources[k].read(start, start + self.buffers.length)

    def _read_base(self, start: int) -> torch.Tensor:
        assert self.base is not None
        return self.base.read(start, start + self.buffers.length)

    def _read_lanes(self, draw_round: int, start: int) -> torch.Tensor:
        lanes = self.buffers.stream.read(self.plan.keys[draw_round], start, start + self.buffers.length)
        return lanes if self.plan.lane == torch.int16 else self.buffers.lanes.copy_(lanes)

    def _replace(self, masks: _Masks, start: int, out: torch.Tensor, index: torch.Tensor | None) -> None:
        """Write to ``out`` the last sub-model's elements, replaced by those of each other where its mask is 1."""
        chosen = self._read(-1, start)
        if index is not None:
            index.fill_(len(self.plan.slots) - 1)
        for k, mask in masks:
            if index is not None:
                point(index, mask, k)
            chosen = self._blend(chosen, self._read(k, start), mask, out)
        if chosen is not out:
            out.copy_(chosen)

    def _blend(
        self, chosen: torch.Tensor, candidate: torch.Tensor, mask: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Write to ``out`` what was chosen, replaced by the candidate where the mask is 1."""
        change = torch.sub(candidate, chosen, out=self.buffers.change)
        narrow = self.plan.element != self.plan.lane
        return torch.addcmul(chosen, change, self.buffers.factor.copy_(mask) if narrow else mask, out=out)


class Buffers:
    """What a thread needs to merge chunks of one length. Tensors that a plan has no use for have no elements."""

    def __init__(self, plan: Plan, length: int, scratch: Scratch):
        scratch.reset()
        self.length = length
        self.stream = DrawStream(length, scratch.empty)
        nothing = torch.empty(0, dtype=plan.element, device=plan.like.device)
        made = {
            name: [scratch.empty(length, dtype) for _ in range(count)] or [nothing]
            for name, (count, dtype) in _layout(plan).items()
        }
        self.strided, self.reach = made["strided"], made["reach"]
        self.masks = made["masks"] if plan.rounds is not None else made["masks"] * (len(plan.slots) - 1)
        self.lanes, self.factor, self.change = made["lanes"][0], made["factor"][0], made["change"][0]
        self.strided_base, self.target, self.product = made["strided_base"][0], made["target"][0], made["product"][0]
        self.unsettled, self.redrawn = made["unsettled"][0], made["redrawn"][0]
        if plan.rounds is not None:  # the reach of each sub-model before any is drawn, of no dimension
            self.full_reach = torch.tensor(plan.slots, device=plan.like.device).cumsum(0).to(plan.lane).unbind()

    @staticmethod
    def element_bytes(plan: Plan) -> int:
        """Return the bytes for each element of a chunk."""
        return DrawStream.BYTES + sum(count * dtype.itemsize for count, dtype in _layout(plan).values())


def _layout(plan: Plan) -> dict[str, tuple[int, torch.dtype]]:
    """Return how many buffers of which dtype a plan needs, by their name in ``Buffers``."""
    element, lane = plan.element, plan.lane
    sub_models, base, redraws = len(plan.slots), plan.base is not None, plan.rounds is not None
    strided = not all(tensor.is_contiguous() for tensor in plan.tensors)
    strided_base = plan.base is not None and not plan.base.is_contiguous()
    return {
        "lanes": (int(lane != torch.int16), lane),
        "factor": (int(lane != element), element),
        "change": (1, element),
        "strided": (2 if strided else 0, element),  # no step looks at more than two neighbours
        "strided_base": (int(strided_base), element),
        "masks": (sub_models - 1 if redraws else 1, lane),  # kept for a redraw, else used up one after the other
        "reach": (sub_models if base else 0, lane),
        "target": (int(base), lane),
        "product": (int(base), torch.int32 if sum(plan.slots) < HALF else torch.int64),  # 16 bits by 15 or 16
        "unsettled": (int(redraws), lane),
        "redrawn": (int(redraws), element),
    }


def point(index: torch.Tensor, mask: torch.Tensor, position: torch.Tensor | int) -> None:
    """Set an int16 index to a position where the mask is 1; masked_fill_ would mispredict branches."""
    index.addcmul_(position - index, mask.to(torch.int16))


class _Flat:
    """A tensor's bits as integers in row-major order; those of a strided one are copied as they are read."""

    def __init__(self, bits: torch.Tensor, buffer: torch.Tensor):
        self._bits = bits
        self._flat = bits.view(-1) if bits.is_contiguous() else None
        self._buffer = buffer
        self._start, self._chunk = -1, buffer

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start`` to ``stop``; not to be written to, and valid until the buffer's next use."""
        if self._flat is not None:
            if start != self._start:  # a chunk is read up to two times a round, and slicing takes its time
                self._start, self._chunk = start, self._flat[start:stop]
            return self._chunk
        _copy_range(self._bits, start, stop, self._buffer)
        return self._buffer


def _copy_range(bits: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
    """Copy the elements of row-major index ``start`` to ``stop`` to the beginning of a flat tensor."""
    if bits.is_contiguous():
        out[: stop - start].copy_(bits.view(-1)[start:stop])
        return
    row = bits[0].numel()
    head = min(stop, -(-start // row) * row)
    if start < head:  # what is left of a row that began before
        _copy_range(bits[start // row], start % row, start % row + head - start, out)
    tail = max(head, stop // row * row)
    if head < tail:
        rows = bits[head // row : tail // row]
        out[head - start : tail - start].view(rows.shape).copy_(rows)
    if tail < stop:  # a row that ends later
        _copy_range(bits[tail // row], 0, stop - tail, out[tail - start :])
