"""What decides the bits of a merged tensor: inputs, weights, thresholds and keys, before any element is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_select.draws import BITS, stream_key
from mergekit_select.errors import ParameterError, TensorError, UnsupportedDtypeError
from mergekit_select.weights import slots, thresholds

HALF = 1 << (BITS - 1)  # draws are kept minus this, to fit int16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Plan:
    """A merge of one tensor; shared by all threads.

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


def make_plan(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    weights: Sequence[float] | None,
    rounds: int | None,
    seed: int,
    name: str,
) -> Plan:
    """Check what ``selection.select`` and ``selection.resample`` are given, and decide all that does not take looking.

    Raises:
        MergekitSelectError: As they say.
    """
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
    sums = torch.int16 if sum(drawable) < HALF else torch.int32
    return Plan(
        like=like,
        tensors=tuple(tensors[k].detach().view(element) for k in positions),
        positions=positions,
        base=None if base is None else base.detach().view(element),
        element=element,
        lane=max(element, sums, key=lambda dtype: dtype.itemsize),
        slots=drawable,
        thresholds=thresholds(drawable),
        rounds=rounds,
        keys=tuple(stream_key(seed, name, r) for r in range(1 + (rounds or 0))),
    )


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
