"""What must hold before anything is timed: a fast wrong answer is no figure."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from inputs import NAME, Inputs, bits

# The slow reference that the tests compare with. Its folder goes last, so that none of its modules hides another.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import reference

_REFERENCE_ELEMENTS = 2048  # a few tens of milliseconds
_PIECE = 1 << 20


class WrongResultError(AssertionError):
    """A contestant's result is not what its method promises."""


def check_finite(inputs: Inputs, result: torch.Tensor) -> None:
    """Check what can be said of any merge: the inputs' shape and dtype, and finite values."""
    if result.shape != inputs.base.shape or result.dtype != inputs.base.dtype:
        raise WrongResultError(f"got {result.dtype} {tuple(result.shape)} for {inputs.base.dtype} {inputs.base.shape}")
    if not all(bool(piece.isfinite().all()) for piece in result.view(-1).split(_PIECE)):
        raise WrongResultError("the result has values that are not finite")


def check_copy(inputs: Inputs, result: torch.Tensor) -> None:
    """Check that the result has the bits of the first sub-model."""
    check_finite(inputs, result)
    if not torch.equal(bits(result), bits(inputs.models[0])):
        raise WrongResultError("the result differs from the first sub-model")


def check_xor(inputs: Inputs, result: torch.Tensor) -> None:
    """Check that the result has the bits of all sub-models, combined by exclusive or."""
    combined = bits(inputs.models[0]).clone()
    for model in inputs.models[1:]:
        combined ^= bits(model)
    if not torch.equal(bits(result), combined):
        raise WrongResultError("the result is not the exclusive or of the sub-models")


def check_one_of_the_models(inputs: Inputs, result: torch.Tensor) -> None:
    """Check that each element has the bits of that element in a sub-model."""
    check_finite(inputs, result)
    if not _all_among(result, inputs.models):
        raise WrongResultError("an element is none of the sub-models'")


def check_selection(inputs: Inputs, result: torch.Tensor, name: str = NAME) -> None:
    """Check against the candidates everywhere, and against the slow reference at the beginning."""
    check_one_of_the_models(inputs, result)
    head, models, _ = _integers(inputs, result)
    if head != reference.merge(models, name=name)[0]:
        raise WrongResultError("the first elements are not those that the reference selects")


def check_resampling(inputs: Inputs, result: torch.Tensor, rounds: int | None = None, name: str = NAME) -> None:
    """Check like a selection; without a limit, an element also differs from the base where any sub-model's does."""
    check_finite(inputs, result)
    if not _all_among(result, inputs.models):  # one equal to the base is among them: it equals a sub-model's too
        raise WrongResultError("an element is none of the sub-models'")
    if rounds is None and not _differs_where_possible(inputs, result):
        raise WrongResultError("an element equals the base although a sub-model's differs")
    head, models, base = _integers(inputs, result)
    if head != reference.merge(models, base, rounds=rounds, name=name)[0]:
        raise WrongResultError("the first elements are not those that the reference resamples")


def _all_among(result: torch.Tensor, candidates: tuple[torch.Tensor, ...]) -> bool:
    pieces = zip(*(bits(tensor).view(-1).split(_PIECE) for tensor in (result, *candidates)), strict=True)
    return all(bool(_any_equal(piece, others).all()) for piece, *others in pieces)


def _any_equal(piece: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    found = torch.zeros_like(piece, dtype=torch.bool)
    for other in others:
        found |= piece == other
    return found


def _differs_where_possible(inputs: Inputs, result: torch.Tensor) -> bool:
    tensors = (result, inputs.base, *inputs.models)
    for piece, base, *models in zip(*(bits(tensor).view(-1).split(_PIECE) for tensor in tensors), strict=True):
        all_equal = torch.ones_like(piece, dtype=torch.bool)
        for model in models:
            all_equal &= model == base
        if not torch.equal(piece == base, all_equal):
            return False
    return True


def _integers(inputs: Inputs, result: torch.Tensor) -> tuple[list[int], list[list[int]], list[int]]:
    head, base, *models = (
        bits(tensor).view(-1)[:_REFERENCE_ELEMENTS].tolist() for tensor in (result, inputs.base, *inputs.models)
    )
    return head, models, base
