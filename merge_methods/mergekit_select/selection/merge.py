"""Parameter selection and resampling on tensors: copies element bits from inputs, as the draws say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from mergekit_select.errors import ParameterError, TensorError
from mergekit_select.selection import kernel_c, kernel_torch
from mergekit_select.selection.limits import LIMITS, Limits, new_tensor
from mergekit_select.selection.plan import Selection, make_selection

_VARIABLE = "MERGEKIT_SELECT_KERNEL"


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
    return merge(make_selection(tensors, None, weights, None, seed, name))


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
        MergekitSelectError: As for ``select``, or ``rounds`` is below 1.
        TensorError: There is no base.
    """
    if not isinstance(base, torch.Tensor):
        raise TensorError(f"resample needs the base's tensor, got {base!r}; to draw without one, use select")
    return merge(make_selection(tensors, base, weights, rounds, seed, name))


def drawn(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    *,
    weights: Sequence[float] | None = None,
    rounds: int | None = None,
    seed: int = 0,
    name: str = "",
) -> Iterator[Drawn]:
    """Return chunk by chunk where ``select``, or ``resample`` if there is a base, copies each element from.

    Arguments and errors are theirs.
    """
    return trace(make_selection(tensors, base, weights, rounds, seed, name))


def kernel_name() -> str:
    """Return which kernel merges tensors on processors: ``c`` or ``torch``. No bit depends on it.

    The environment variable ``MERGEKIT_SELECT_KERNEL`` chooses; otherwise it is the compiled one where it was built.

    Raises:
        ParameterError: The variable has another value, or asks for the compiled kernel where there is none.
    """
    wanted = os.environ.get(_VARIABLE) or None
    if wanted not in (None, "c", "torch"):
        raise ParameterError(f"{_VARIABLE} must be c or torch, got {wanted!r}; leave it unset to use the faster one")
    if wanted == "torch":
        return wanted
    if kernel_c.library() is not None:
        return "c"
    if wanted == "c":
        raise ParameterError(
            f"{_VARIABLE} is c, but this installation has no compiled kernel in {kernel_c.LIBRARY}; install the "
            f"package again where there is a C compiler, or unset the variable"
        )
    return "torch"


def merge(selection: Selection, limits: Limits = LIMITS, kernel: ModuleType | None = None) -> torch.Tensor:
    """Return the merged tensor; by the kernel for its device, unless another one is given."""
    merged = new_tensor(selection.tensors[0], limits)
    (kernel or _kernel_for(merged.device)).merge(selection, merged, limits)
    return merged


def trace(selection: Selection, limits: Limits = LIMITS, kernel: ModuleType | None = None) -> Iterator[Drawn]:
    """Return chunk by chunk where the elements come from: merge positions, -1 for the base, in place of elements.

    Each sub-model gives its position where its element differs from the base's, and -1 where it equals it.
    """
    like, base = selection.tensors[0], selection.base
    kernel = kernel or _kernel_for(like.device)
    chunk = limits.chunk_of(like.device, len(selection.tensors))
    for start in range(0, like.numel(), chunk):
        stop = min(start + chunk, like.numel())
        first = torch.empty(stop - start, dtype=torch.int16, device=like.device)
        chosen = torch.empty_like(first)
        everywhere = tuple(first.new_full((), k).expand_as(first) for k in selection.positions)
        drawing = replace(selection, tensors=everywhere, base=None, rounds=None, origin=selection.origin + start)
        kernel.merge(drawing, first, limits)
        if base is None:
            chosen.copy_(first)
        else:
            stays = kernel_torch.read(base, start, stop)
            differ = (kernel_torch.read(tensor, start, stop) != stays for tensor in selection.tensors)
            where = tuple(
                d.to(first.dtype).mul_(k + 1).sub_(1) for d, k in zip(differ, selection.positions, strict=True)
            )
            nowhere = first.new_full((), -1).expand_as(first)
            kernel.merge(replace(drawing, tensors=where, base=nowhere, rounds=selection.rounds), chosen, limits)
        yield Drawn(start, first, chosen)


def _kernel_for(device: torch.device) -> ModuleType:
    if device.type == "cpu" and kernel_name() == "c":
        return kernel_c
    return kernel_torch
