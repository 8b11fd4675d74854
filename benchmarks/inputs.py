"""Random tensors of a base and of sub-models that left a share of its parameters unchanged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cases import Case

NAME = "model.layers.0.mlp.up_proj.weight"
_INTEGERS = {2: torch.int16, 4: torch.int32}
# Made piece by piece: temporaries as large as the tensors would count as the peak of the memory measurement.
_PIECE = 1 << 20


@dataclass(frozen=True)
class Inputs:
    """What every contestant of a case is given.

    Attributes:
        base: The base model's tensor.
        models: Those of the sub-models.
    """

    base: torch.Tensor
    models: tuple[torch.Tensor, ...]

    def head(self, count: int) -> Inputs:
        """Return the first elements of each tensor."""
        return Inputs(self.base[:count], tuple(model[:count] for model in self.models))


def make(case: Case, seed: int = 0) -> Inputs:
    """Draw the inputs of a case; the same for the same case and seed."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    base = random_tensor((case.elements,), dtype, seed)
    models = (fine_tuned(base, case.unchanged, seed + 1 + k) for k in range(case.sub_models))
    return Inputs(base, tuple(models))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 0.02) -> torch.Tensor:
    """Return normally distributed values, of the scale that weights have."""
    generator = torch.Generator().manual_seed(seed)
    result = torch.empty(shape, dtype=dtype)
    for piece in result.view(-1).split(_PIECE):
        piece.copy_(torch.randn(len(piece), generator=generator).mul_(scale))
    return result


def fine_tuned(base: torch.Tensor, unchanged: float, seed: int) -> torch.Tensor:
    """Return the base with a few of the low bits flipped, except in that share of its elements.

    Low bits move a value a little, as fine-tuning does, and flipping at least one makes sure that it moves.
    """
    generator = torch.Generator().manual_seed(seed)
    result = base.clone()
    for piece in bits(result).view(-1).split(_PIECE):
        flips = torch.randint(1, 16, piece.shape, generator=generator, dtype=torch.int16)
        flips *= torch.rand(piece.shape, generator=generator) >= unchanged
        piece.bitwise_xor_(flips.to(piece.dtype))
    return result


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """View the elements as the integers that their bits are."""
    return tensor.view(_INTEGERS[tensor.element_size()])
