"""Parameter selection and resampling on tensors: copies element bits from inputs, as the draws say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mergekit_select.selection_plan import Plan, make_plan
from mergekit_select.selection_scratch import Scratch, new_tensor
from mergekit_select.selection_threads import pool, scratch, share
from mergekit_select.selection_worker import Worker, point


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
    return _run(make_plan(tensors, None, weights, None, seed, name))


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
    return _run(make_plan(tensors, base, weights, rounds, seed, name))


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
    return _trace(make_plan(tensors, base, weights, rounds, seed, name), len(tensors))


def _run(plan: Plan) -> torch.Tensor:
    with torch.inference_mode(False):  # threads of the pool could not write to what was made in inference mode
        merged = new_tensor(plan.like)
        flat = merged.view(plan.element).view(-1)
    chunk, threads = share(plan)
    starts = iter(range(0, len(flat), chunk))
    every = torch.get_num_threads()

    @torch.no_grad()
    def work() -> None:
        with scratch(plan.like.device, every) as memory:
            worker = Worker(plan, chunk, memory)
            for start in starts:
                worker.merge(start, flat[start : start + chunk])

    if threads == 0:
        work()
        return merged
    futures = [pool(every).submit(work) for _ in range(threads)]
    try:
        for future in futures:
            future.result()
    finally:
        for _ in starts:  # where one has failed, or the wait was interrupted, the others find nothing left to do
            pass
    return merged


def _trace(plan: Plan, given: int) -> Iterator[Drawn]:
    like, device = plan.like, plan.like.device
    positions = torch.tensor([*plan.positions, -1], dtype=torch.int16, device=device)
    chunk, _ = share(plan)
    worker = Worker(plan, chunk, Scratch(device))  # of its own: others may merge before this is asked for more
    for start in range(0, like.numel(), chunk):
        with torch.no_grad():
            values = torch.empty(min(chunk, like.numel() - start), dtype=plan.element, device=device)
            first = torch.full(values.shape, len(plan.slots) - 1, dtype=torch.int16, device=device)
            worker.fit(len(values))
            for k, mask in worker.draw_first(start):
                point(first, mask, k)
            chosen = torch.empty_like(first)
            worker.merge(start, values, chosen)
            if worker.base is not None:
                chosen.masked_fill_(values == worker.base.read(start, start + len(values)), -1)
        if len(plan.positions) < given:  # looking up is slow, and mostly nothing would change
            first, chosen = positions[first.long()], positions[chosen.long()]
        yield Drawn(start, first, chosen)
