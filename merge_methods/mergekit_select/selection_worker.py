"""Merge one chunk of a tensor after the other, in buffers that do not grow with it.

The elements are handled as the integers their bits are. What a draw decides is a mask of 0 and 1 per sub-model: "where
it is 1, this sub-model replaces what was chosen so far". The masks come last sub-model first, so that the earliest
whose mask is 1 has the final word. Replacing is ``chosen + (candidate - chosen) * mask`` in integers that wrap around,
hence exact, and runs at memory speed; ``torch.where`` on random masks mispredicts every other branch (8 times slower
here), and stacking the sub-models for ``gather`` is slower still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from mergekit_select.draws import BITS, DrawStream
from mergekit_select.selection_plan import HALF, Plan
from mergekit_select.selection_scratch import Scratch

# (position among the drawable sub-models, mask of 0 and 1), by descending position
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
        self.sources = [_Flat(tensor, self.buffers.strided[k % 2]) for k, tensor in enumerate(plan.tensors)]
        self.base = None if plan.base is None else _Flat(plan.base, self.buffers.strided_base)

    def merge(self, start: int, out: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """Write the merged elements from ``start`` on to ``out``, and to ``index``, if given, where they come from.

        Args:
            start: Row-major index of the first element.
            out: Flat, of the plan's element dtype; one chunk long or less.
            index: int16, shape of ``out``, holding what stands for "no mask is 1".
        """
        if len(out) != self.buffers.length:
            self.fit(len(out))
        if self.base is None:
            self._replace(self.draw_first(start), start, self._read(-1, start), out, index)
            return
        buffers, base = self.buffers, self.base.read(start, start + len(out))
        if self.plan.rounds is None:
            self._reach_of_differing(start, base)
            self._replace(self._draw_among(0, start), start, base, out, index)
            return
        self._replace(self.draw_first(start), start, self._read(-1, start), out, index)
        buffers.masks[-1].fill_(1)  # the first draw makes none for the last sub-model, which takes what is left
        self._cross_off(buffers.full_reach)
        for draw_round in range(1, self.plan.rounds + 1):
            settled = torch.ne(out, base, out=buffers.mark)
            if bool(settled.amin()):  # 15 times faster than all(), which knows booleans only
                break
            self._replace(self._draw_among(draw_round, start, settled), start, out, out, index)
            if draw_round < self.plan.rounds:
                self._cross_off(buffers.reach)

    def draw_first(self, start: int) -> _Masks:
        """Draw among all sub-models; what no mask takes is the last one's."""
        lanes, masks = self._read_lanes(0, start), self.buffers.masks
        for k in reversed(range(len(self.plan.thresholds))):
            yield k, torch.lt(lanes, self.plan.thresholds[k] - HALF, out=masks[k])

    def _draw_among(self, draw_round: int, start: int, settled: torch.Tensor | None = None) -> _Masks:
        """Draw for each element among its alternatives; none where there is none, or settled is 1.

        Reach k is the sum of the slots of those alternatives that are sub-model k or come before it. With S the last
        reach and u the draw, the target is u * S / 2^16 rounded down, and the first sub-model is drawn whose reach
        exceeds it.
        """
        buffers = self.buffers
        target, product, reach = buffers.target, buffers.product, buffers.reach
        product.copy_(self._read_lanes(draw_round, start)).add_(HALF)
        target.copy_(product.mul_(reach[-1]).bitwise_right_shift_(BITS))
        if settled is not None:
            target.bitwise_or_(settled.mul_(torch.iinfo(target.dtype).max))  # which nothing exceeds
        for k in reversed(range(len(self.plan.slots))):
            yield k, torch.gt(reach[k], target, out=buffers.masks[k])

    def _reach_of_differing(self, start: int, base: torch.Tensor) -> None:
        """Sum the slots of the sub-models that differ from the base."""
        buffers = self.buffers
        reach = buffers.nothing
        for k, count in enumerate(self.plan.slots):
            # Kept for each sub-model: with a running sum, which differ would be asked a second time.
            differs = torch.ne(self._read(k, start), base, out=buffers.mark)
            reach = torch.add(reach, differs, alpha=count, out=buffers.reach[k])

    def _cross_off(self, reach: Sequence[torch.Tensor]) -> None:
        """Take what the masks have just drawn out of the alternatives: out of its own reach and the later ones."""
        buffers, slots = self.buffers, self.plan.slots
        if min(slots) == max(slots):
            for before, mask, after in zip(reach, buffers.masks, buffers.reach, strict=True):
                torch.sub(before, mask, alpha=slots[0], out=after)
            return
        drawn = buffers.mark.fill_(slots[-1])  # the slots of the sub-model that each element has drawn
        for k, (count, following) in enumerate(pairwise(slots)):
            if count != following:
                drawn.add_(buffers.masks[k], alpha=count - following)
        for before, mask, after in zip(reach, buffers.masks, buffers.reach, strict=True):
            torch.addcmul(before, drawn, mask, value=-1, out=after)

    def _read(self, k: int, start: int) -> torch.Tensor:
        return self.sources[k].read(start, start + self.buffers.length)

    def _read_lanes(self, draw_round: int, start: int) -> torch.Tensor:
        lanes = self.buffers.stream.read(self.plan.keys[draw_round], start, start + self.buffers.length)
        return lanes if self.plan.lane == torch.int16 else self.buffers.lanes.copy_(lanes)

    def _replace(
        self, masks: _Masks, start: int, chosen: torch.Tensor, out: torch.Tensor, index: torch.Tensor | None
    ) -> None:
        """Write to ``out`` what was chosen so far, replaced by a sub-model's elements where its mask is 1."""
        change = self.buffers.change
        narrow = self.plan.element != self.plan.lane
        for k, mask in masks:
            if index is not None:
                point(index, mask, k)
            torch.sub(self._read(k, start), chosen, out=change)
            factor = self.buffers.factor.copy_(mask) if narrow else mask
            chosen = torch.addcmul(chosen, change, factor, out=out)
        if chosen is not out:
            out.copy_(chosen)


class Buffers:
    """What a thread needs to merge chunks of one length."""

    def __init__(self, plan: Plan, length: int, scratch: Scratch):
        def buffer(dtype: torch.dtype) -> torch.Tensor:
            return scratch.empty(length, dtype)

        scratch.reset()
        self.length = length
        self.stream = DrawStream(length, scratch.empty)
        self.lanes = buffer(plan.lane)
        self.factor, self.change = buffer(plan.element), buffer(plan.element)
        # Two for strided sub-models: no step looks at more than two neighbours.
        self.strided = (buffer(plan.element), buffer(plan.element))
        if plan.rounds is None:
            self.masks = [buffer(plan.lane)] * len(plan.slots)  # each is used up before the next is made
        else:
            self.masks = [buffer(plan.lane) for _ in plan.slots]
        if plan.base is not None:
            self.strided_base = buffer(plan.element)
            self.nothing = torch.tensor(0, dtype=plan.lane, device=plan.like.device)
            self.full_reach = torch.tensor(plan.slots, device=plan.like.device).cumsum(0).to(plan.lane).unbind()
            self.reach = [buffer(plan.lane) for _ in plan.slots]
            self.target, self.mark = buffer(plan.lane), buffer(plan.lane)
            self.product = buffer(torch.int32 if sum(plan.slots) < HALF else torch.int64)  # 16 bits by 15 or 16

    @staticmethod
    def element_bytes(plan: Plan) -> int:
        """Return the bytes for each element of a chunk."""
        sub_models, lane = len(plan.slots), plan.lane.itemsize
        result = DrawStream.BYTES + 2 * lane + 4 * plan.element.itemsize
        if plan.base is not None:
            result += plan.element.itemsize + (2 + sub_models) * lane + torch.int64.itemsize
        if plan.rounds is not None:
            result += (sub_models - 1) * lane
        return result


def point(index: torch.Tensor, mask: torch.Tensor, position: int) -> None:
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
