"""What decides the bits of a merged tensor: inputs, weights, thresholds and keys, before any element is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_select.errors import ParameterError, TensorError, UnsupportedDtypeError
from mergekit_select.selection.draws import stream_key
from mergekit_select.selection.slots import slots, thresholds


@dataclass(frozen=True)
class Selection:
    """A merge of one tensor, or of a run of its elements.

    Attributes:
        tensors: Those of the sub-models that can be drawn.
        positions: Their positions among all sub-models given.
        base: The base's tensor, if there is one.
        slots: Of the sub-models that can be drawn; see ``slots.slots``.
        thresholds: See ``slots.thresholds``.
        rounds: The most redraws; None for until the value differs.
        keys: The draws' key in each round.
        origin: Row-major index of the tensors' first element in the tensor whose draws these are.
    """

    tensors: tuple[torch.Tensor, ...]
    positions: tuple[int, ...]
    base: torch.Tensor | None
    slots: tuple[int, ...]
    thresholds: tuple[int, ...]
    rounds: int | None
    keys: tuple[int, ...]
    origin: int = 0


def make_selection(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    weights: Sequence[float] | None,
    rounds: int | None,
    seed: int,
    name: str,
) -> Selection:
    """Check what ``select`` and ``resample`` are given, and decide all that does not take looking.

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
    return Selection(
        tensors=tuple(_plain(tensors[k]) for k in positions),
        positions=positions,
        base=None if base is None else _plain(base),
        slots=drawable,
        thresholds=thresholds(drawable),
        rounds=rounds,
        keys=tuple(stream_key(seed, name, r) for r in range(1 + (rounds or 0))),
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, its memory holding the bits that it stands for."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


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
