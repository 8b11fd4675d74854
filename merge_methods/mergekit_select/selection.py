"""Parameter selection and resampling on tensors: copies element bits from inputs, as the draws say.

A tensor is handled as the integers its bits are, one chunk at a time, in buffers that do not grow with it. What a draw
decides is a mask of 0 and 1 per sub-model: "where it is 1, this sub-model replaces what was chosen so far". The masks
come last sub-model first, so that the earliest whose mask is 1 has the final word. Replacing is
``chosen + (candidate - chosen) * mask`` in integers that wrap around, hence exact, and runs at memory speed;
``torch.where`` on random masks mispredicts every other branch (8 times slower here), and stacking the sub-models for
``gather`` is slower still.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch

from mergekit_select.draws import BITS, DrawStream, stream_key
from mergekit_select.errors import ParameterError, TensorError, UnsupportedDtypeError
from mergekit_select.weights import slots, thresholds

# Elements handled at once. On a processor, of 2^16 to 2^20 these were best (measured with two threads and 2 MiB of L2
# cache each): fewer leave the threads waiting for the interpreter, more fall out of the caches. An accelerator has
# kernel launches to make up for.
_CHUNK_CPU = 1 << 18
_CHUNK_ACCELERATOR = 1 << 20
# Chunks and threads become fewer until the buffers fit in these bytes, of one thread and of all.
_WORKER_BYTES = 8 << 20
_BUFFER_BYTES = 48 << 20
# Fewer elements are merged in the calling thread, since handing chunks to others takes longer than it saves; in chunks
# so small that torch does not share single operations among its threads either.
_SHARED_FROM = 1 << 18
_UNSHARED_CHUNK = (1 << 15) - 4

_HALF = 1 << (BITS - 1)  # draws are kept minus this, to fit int16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# (position among the drawable sub-models, mask of 0 and 1), by descending position
_Masks = Iterator[tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Drawn:
    """Where the elements of one chunk come from, as positions in the list of sub-models.

    Attributes:
        start: Row-major index of the chunk's first element.
        first: int16, shape (n,): the sub-model drawn first.
        chosen: int16, shape (n,): the sub-model copied from; -1 where the element is left at the base.
    """

    start: int
    first: torch.Tensor
    chosen: torch.Tensor


def select(
    tensors: Sequence[torch.Tensor],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    name: str = "",
) -> torch.Tensor:
    """Copy each element whole from one of the tensors, drawn at random: parameter selection.

    Source: Ju et al., "Mitigating Training Imbalance in LLM Fine-Tuning via Selective Parameter Merging", EMNLP 2024.

    Args:
        tensors: One per sub-model, in recipe order; of equal shape, device and floating dtype of 8, 16, 32 or 64
            bits; any strides. They are not modified.
        weights: Relative selection probability of each: finite, at least 0, not all 0. Equal when left out.
        seed: In [0, 2^63).
        name: The output tensor's name; the draws depend on it.

    Returns:
        A new contiguous tensor of the inputs' shape, dtype and device, without autograd history.

    Raises:
        ParameterError: A weight or the seed breaks its rule.
        TensorError: There are no tensors, or their shapes, dtypes or devices differ.
        UnsupportedDtypeError: Their dtype is none of those above.
    """
    return _run(_plan(tensors, None, weights, None, seed, name))


def resample(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor,
    *,
    weights: Sequence[float] | None = None,
    rounds: int | None = None,
    seed: int = 0,
    name: str = "",
) -> torch.Tensor:
    """Like ``select``, but draw again among the alternatives where the drawn value equals the base's: resampling.

    Source: as for ``select``, figure 2. Two values are equal when their bits are.

    Args:
        tensors: One per sub-model, as for ``select``.
        base: The base model's tensor, like the others; never drawn.
        weights: As for ``select``.
        rounds: The most redraws, at least 1, each among the sub-models not yet drawn for that element. Left out, or
            no smaller than the number of sub-models of positive weight minus 1: until the value differs, which is
            drawn directly among the sub-models whose value differs.
        seed: In [0, 2^63).
        name: The output tensor's name.

    Returns:
        As for ``select``; an element is the base's where nothing that differs was drawn.

    Raises:
        ParameterError: As for ``select``, or ``rounds`` is below 1.
        TensorError: As for ``select``, the base included.
        UnsupportedDtypeError: As for ``select``.
    """
    return _run(_plan(tensors, base, weights, rounds, seed, name))


def drawn(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    *,
    weights: Sequence[float] | None = None,
    rounds: int | None = None,
    seed: int = 0,
    name: str = "",
) -> Iterator[Drawn]:
    """Tell chunk by chunk where ``select`` (``resample`` if there is a base) copies each element from.

    Args:
        tensors: As for ``select``.
        base: The base model's tensor, or none for ``select``.
        weights: As for ``select``.
        rounds: As for ``resample``.
        seed: In [0, 2^63).
        name: The output tensor's name.

    Raises:
        MergekitSelectError: As for ``select`` and ``resample``.
    """
    return _trace(_plan(tensors, base, weights, rounds, seed, name), len(tensors))


@dataclass(frozen=True)
class _Plan:
    """What is decided before any element is looked at; shared by all threads.

    Attributes:
        like: The first sub-model's tensor, for shape, dtype and device.
        tensors: Integer views of the sub-models that can be drawn.
        positions: Their positions among all sub-models given.
        base: Integer view of the base, if there is one.
        element: Integer dtype of the elements.
        lane: Integer dtype of draws and masks.
        slots: Of the sub-models that can be drawn; see ``weights.slots``.
        thresholds: See ``weights.thresholds``.
        rounds: The most redraws; None for until the value differs.
        keys: The draws' key in each round.
        chunk: Elements handled at once.
        threads: How many threads of the pool share the chunks; 0 if the calling thread does them all.
    """

    like: torch.Tensor
    tensors: tuple[torch.Tensor, ...]
    positions: tuple[int, ...]
    base: torch.Tensor | None
    element: torch.dtype
    lane: torch.dtype
    slots: tuple[int, ...]
    thresholds: tuple[int, ...]
    rounds: int | None
    keys: tuple[int, ...]
    chunk: int
    threads: int


def _plan(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    weights: Sequence[float] | None,
    rounds: int | None,
    seed: int,
    name: str,
) -> _Plan:
    _require_alike([*tensors] if base is None else [*tensors, base], len(tensors))
    if weights is not None and len(weights) != len(tensors):
        raise ParameterError(f"weights must be one per tensor: got {len(weights)} for {len(tensors)} tensors")
    if rounds is not None and rounds < 1:
        raise ParameterError(f"rounds must be at least 1, got {rounds}; leave it out to redraw until the value differs")
    counts = slots([1.0] * len(tensors) if weights is None else weights)
    positions = tuple(k for k, count in enumerate(counts) if count)  # a weight of 0 is never drawn
    drawable = tuple(counts[k] for k in positions)
    if rounds is not None and rounds >= len(drawable) - 1:
        rounds = None  # drawing all of them, one by one, has the law of drawing among those that differ
    like = tensors[0]
    element = _INTEGERS[like.element_size()]
    # Draws and sums of slots need 16 bits, large sums 17. Where elements have as many, masks of the elements' own width
    # spare a conversion per sub-model.
    sums = torch.int16 if sum(drawable) < _HALF else torch.int32
    lane = max(element, sums, key=lambda dtype: dtype.itemsize)
    chunk, threads = _share(like, _Buffers.element_bytes(element, lane, len(drawable), base is not None, rounds))
    return _Plan(
        like=like,
        tensors=tuple(tensors[k].detach().view(element) for k in positions),
        positions=positions,
        base=None if base is None else base.detach().view(element),
        element=element,
        lane=lane,
        slots=drawable,
        thresholds=thresholds(drawable),
        rounds=rounds,
        keys=tuple(stream_key(seed, name, r) for r in range(1 + (rounds or 0))),
        chunk=chunk,
        threads=threads,
    )


def _share(like: torch.Tensor, element_bytes: int) -> tuple[int, int]:
    """Return how many elements to handle at once, and in how many threads of the pool; 0 for the calling thread."""
    size = max(1, like.numel())
    if like.device.type != "cpu":
        chunk = _CHUNK_ACCELERATOR
        while chunk * element_bytes > _BUFFER_BYTES:
            chunk //= 2
        return min(chunk, size), 0
    chunk = _CHUNK_CPU
    while chunk * element_bytes > _WORKER_BYTES:
        chunk //= 2
    threads = torch.get_num_threads()
    # Without OpenMP, torch has one number of threads for the whole process, which is not ours to change.
    openmp: bool = torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]  # torch's omission
    if threads == 1 or not openmp:
        return min(chunk, size), 0
    if size < _SHARED_FROM:
        return min(chunk, size, _UNSHARED_CHUNK), 0
    chunk = min(chunk, -(-size // threads))
    return chunk, min(threads, _BUFFER_BYTES // (chunk * element_bytes), -(-size // chunk))


def _run(plan: _Plan) -> torch.Tensor:
    merged = torch.empty(plan.like.shape, dtype=plan.like.dtype, device=plan.like.device)
    flat = merged.view(plan.element).view(-1)
    starts = iter(range(0, len(flat), plan.chunk))

    @torch.no_grad()
    def work() -> None:
        worker = _Worker(plan)
        for start in starts:
            worker.merge(start, flat[start : start + plan.chunk])

    if plan.threads == 0:
        work()
        return merged
    pool = _pool(torch.get_num_threads())
    futures = [pool.submit(work) for _ in range(plan.threads)]
    try:
        for future in futures:
            future.result()
    finally:
        for _ in starts:  # where one has failed, or the wait was interrupted, the others find nothing left to do
            pass
    return merged


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return that many threads, in which torch runs each operation in one thread.

    A chunk takes dozens of operations of some microseconds. Shared among torch's own threads, each of them waits for
    the slowest thread; with another process busy on one of two cores that took 10 to 100 times as long as this.
    """
    pool = ThreadPoolExecutor(threads, "mergekit-select", initializer=torch.set_num_threads, initargs=(1,))
    started = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    # With OpenMP each thread has a number of its own, but the last one set is what new threads begin with: restore it.
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork leaves the threads behind


def _trace(plan: _Plan, given: int) -> Iterator[Drawn]:
    like, device = plan.like, plan.like.device
    positions = torch.tensor([*plan.positions, -1], dtype=torch.int16, device=device)
    worker = _Worker(plan)
    for start in range(0, like.numel(), plan.chunk):
        with torch.no_grad():
            values = torch.empty(min(plan.chunk, like.numel() - start), dtype=plan.element, device=device)
            first = torch.full(values.shape, len(plan.slots) - 1, dtype=torch.int16, device=device)
            worker.fit(len(values))
            for k, mask in worker.draw_first(start):
                _point(first, mask, k)
            among_differing = worker.base is not None and plan.rounds is None
            chosen = torch.full_like(first, -1) if among_differing else first.clone()
            worker.merge(start, values, chosen)
            if worker.base is not None:
                chosen.masked_fill_(values == worker.base.read(start, start + len(values)), -1)
        if len(plan.positions) < given:  # looking up is slow, and mostly nothing would change
            first, chosen = positions[first.long()], positions[chosen.long()]
        yield Drawn(start, first, chosen)


class _Buffers:
    """What a thread needs to merge chunks of one length."""

    def __init__(self, plan: _Plan, length: int):
        def buffer(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(length, dtype=dtype, device=plan.like.device)

        self.length = length
        self.stream = DrawStream(length, plan.like.device)
        self.lanes, self.mask = buffer(plan.lane), buffer(plan.lane)
        self.factor, self.change = buffer(plan.element), buffer(plan.element)
        # Two for strided sub-models: no step looks at more than two neighbours.
        self.strided = (buffer(plan.element), buffer(plan.element))
        if plan.base is not None:
            self.strided_base = buffer(plan.element)
            self.nothing = torch.tensor(0, dtype=plan.lane, device=plan.like.device)
            self.reach = [buffer(plan.lane) for _ in plan.slots]
            self.target, self.mark = buffer(plan.lane), buffer(plan.lane)
            self.product = buffer(torch.int32 if sum(plan.slots) < _HALF else torch.int64)  # 16 bits by 15 or 16
        self.undrawn = [buffer(plan.lane) for _ in plan.slots] if plan.rounds is not None else []

    @staticmethod
    def element_bytes(
        element: torch.dtype, lane: torch.dtype, sub_models: int, has_base: bool, rounds: int | None
    ) -> int:
        """Return the bytes for each element of a chunk."""
        result = DrawStream.BYTES + 2 * lane.itemsize + 4 * element.itemsize
        if has_base:
            result += element.itemsize + (2 + sub_models) * lane.itemsize + torch.int64.itemsize
        if rounds is not None:
            result += sub_models * lane.itemsize
        return result


class _Worker:
    """Merges chunk after chunk in the same buffers."""

    def __init__(self, plan: _Plan):
        self.plan = plan
        self.fit(plan.chunk)

    def fit(self, length: int) -> None:
        """Make the buffers fit chunks of this length; the last of a tensor is mostly shorter."""
        plan = self.plan
        self.buffers = _Buffers(plan, length)
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

            def differs(k: int) -> torch.Tensor:
                return torch.ne(self._read(k, start), base, out=buffers.mark)

            self._replace(self._draw_among(differs, 0, start), start, base, out, index)
            return
        for undrawn in buffers.undrawn[:-1]:
            undrawn.fill_(1)
        buffers.undrawn[-1].zero_()  # of the last, the first draw's masks tell where it is not drawn
        masks = _cross_off(self.draw_first(start), buffers.undrawn)
        self._replace(masks, start, self._read(-1, start), out, index)
        for draw_round in range(1, self.plan.rounds + 1):
            settled = torch.ne(out, base, out=buffers.mark)
            if bool(settled.amin()):  # 15 times faster than all(), which knows booleans only
                break
            masks = self._draw_among(buffers.undrawn.__getitem__, draw_round, start, settled)
            if draw_round < self.plan.rounds:
                masks = _cross_off(masks, buffers.undrawn)
            self._replace(masks, start, out, out, index)

    def draw_first(self, start: int) -> _Masks:
        """Draw among all sub-models; what no mask takes is the last one's."""
        lanes, mask = self._read_lanes(0, start), self.buffers.mask
        for k in reversed(range(len(self.plan.thresholds))):
            yield k, torch.lt(lanes, self.plan.thresholds[k] - _HALF, out=mask)

    def _draw_among(
        self, mark: Callable[[int], torch.Tensor], draw_round: int, start: int, settled: torch.Tensor | None = None
    ) -> _Masks:
        """Draw for each element among the sub-models whose mark is 1; none where there is none, or settled is 1.

        With S the sum of the marked slots and u the draw, the target is u * S / 2^16 rounded down, and the first
        sub-model is drawn at which the sum of the marked slots, its own included, exceeds the target.
        """
        buffers = self.buffers
        target, mask, product = buffers.target, buffers.mask, buffers.product
        reach = buffers.nothing
        for k, count in enumerate(self.plan.slots):
            # Kept for each sub-model: with a running sum the marks would be needed a second time.
            reach = torch.add(reach, mark(k), alpha=count, out=buffers.reach[k])
        product.copy_(self._read_lanes(draw_round, start)).add_(_HALF)
        target.copy_(product.mul_(reach).bitwise_right_shift_(BITS))
        if settled is not None:
            target.bitwise_or_(settled.mul_(torch.iinfo(target.dtype).max))  # which nothing exceeds
        for k in reversed(range(len(self.plan.slots))):
            yield k, torch.gt(buffers.reach[k], target, out=mask)

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
                _point(index, mask, k)
            torch.sub(self._read(k, start), chosen, out=change)
            factor = self.buffers.factor.copy_(mask) if narrow else mask
            chosen = torch.addcmul(chosen, change, factor, out=out)
        if chosen is not out:
            out.copy_(chosen)


def _point(index: torch.Tensor, mask: torch.Tensor, position: int) -> None:
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


def _cross_off(masks: _Masks, undrawn: Sequence[torch.Tensor]) -> _Masks:
    """Pass the masks on, unmarking for each element the sub-model that they draw."""
    for k, mask in masks:
        # It is sub-model k that is drawn where mask k is 1 and mask k - 1, which comes next, is 0.
        undrawn[k].sub_(mask)
        if k + 1 < len(undrawn):
            undrawn[k + 1].add_(mask)
        yield k, mask


def _require_alike(inputs: Sequence[torch.Tensor], count: int) -> None:
    """Raise unless there is a sub-model and all inputs have one shape, device and supported dtype."""
    if count == 0:
        raise TensorError("selection needs the tensor of at least one sub-model, got none")
    first, *others = inputs
    for tensor in inputs:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            kind = str(tensor.layout) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TensorError(f"selection takes dense tensors, got {kind}; convert it before")
    packed = getattr(torch, "float4_e2m1fn_x2", None)  # two values in an element: no parameter to copy whole
    if not first.dtype.is_floating_point or first.dtype == packed:
        raise UnsupportedDtypeError(
            f"selection copies floating-point tensors of 8, 16, 32 or 64 bits, got {first.dtype}; copy such a tensor "
            f"from one model instead"
        )
    for position, other in enumerate(others, start=1):
        for what in ("shape", "dtype", "device"):
            if getattr(other, what) != getattr(first, what):
                place = "the base" if position == count else f"tensor {position}"
                raise TensorError(
                    f"all inputs of a selection must have the same {what}: {place} has {_text(getattr(other, what))}, "
                    f"tensor 0 {_text(getattr(first, what))}; align them before"
                )


def _text(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
