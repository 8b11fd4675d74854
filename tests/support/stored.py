"""Between tensors as torch has them and as files store them; and what a merge of checkpoints must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support import expectation
from tests.support.checkpoints import copied
from tests.support.expectation import Stored

INTEGER_VIEWS = {torch.bfloat16: ("BF16", torch.int16), torch.float16: ("F16", torch.int16)}
INTEGER_VIEWS |= {torch.float32: ("F32", torch.int32), torch.float64: ("F64", torch.int64)}

Model = Path | Mapping[str, Stored]


def stored(tensor: torch.Tensor) -> Stored:
    """A tensor as a file would hold it."""
    dtype, view = INTEGER_VIEWS[tensor.dtype]
    bits = tensor.contiguous().view(-1).view(view).numpy()
    return Stored(dtype, tuple(tensor.shape), bits.view(f"u{bits.itemsize}"))


def cast(tensors: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, Stored]:
    """Tensors as torch casts them."""
    return {name: stored(opened(tensor).to(dtype)) for name, tensor in tensors.items()}


def opened(tensor: Stored) -> torch.Tensor:
    dtype = next(dtype for dtype, (name, _) in INTEGER_VIEWS.items() if name == tensor.dtype)
    signed = tensor.bits.view(f"i{tensor.bits.itemsize}")
    return torch.from_numpy(signed.copy()).view(dtype).view(tensor.shape)


def filled(source: Path, target: Path, tensors: Mapping[str, Stored]) -> Path:
    """Copy a checkpoint, with these tensors in the place of its own."""
    return copied(source, target, lambda held: held.update({name: opened(tensor) for name, tensor in tensors.items()}))


def rows_of(tensor: Stored, rows: Sequence[int]) -> Stored:
    """The given rows of a matrix, in that order."""
    bits = tensor.bits.reshape(tensor.shape)[list(rows)]
    return Stored(tensor.dtype, bits.shape, np.ascontiguousarray(bits).reshape(-1))


def read_all(*folders: Path) -> list[dict[str, Stored]]:
    return [expectation.read(folder) for folder in folders]


def wanted(method: str, base: Model, subs: Sequence[Model], **options: Any) -> dict[str, Stored]:
    """The expected tensors of a merge, of folders or of tensors read already."""
    read = [expectation.read(model) if isinstance(model, Path) else model for model in (base, *subs)]
    return expectation.expected(read[1:], read[0] if method.endswith("resampling") else None, **options)
