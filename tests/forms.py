"""Checkpoints in the forms that people bring them in, made from a small one; and what a merge of them must hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import expectation
from checkpoints import tensors_of
from expectation import Stored

INTEGER_VIEWS = {torch.bfloat16: ("BF16", torch.int16), torch.float16: ("F16", torch.int16)}
INTEGER_VIEWS |= {torch.float32: ("F32", torch.int32), torch.float64: ("F64", torch.int64)}

Model = Path | Mapping[str, Stored]
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def copied(source: Path, target: Path, change: Change = dict) -> Path:
    """Copy a checkpoint, with other tensors in their place; config and tokenizer stay as they were."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = change(tensors_of(source))
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def without(missing: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != missing}


def edit_config(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def stored(tensor: torch.Tensor) -> Stored:
    """A tensor as a file would hold it."""
    dtype, view = INTEGER_VIEWS[tensor.dtype]
    bits = tensor.contiguous().view(-1).view(view).numpy()
    return Stored(dtype, tuple(tensor.shape), bits.view(f"u{bits.itemsize}"))


def in_dtype(tensors: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, Stored]:
    """Tensors as torch casts them."""
    return {name: stored(opened(tensor).to(dtype)) for name, tensor in tensors.items()}


def opened(tensor: Stored) -> torch.Tensor:
    dtype = next(dtype for dtype, (name, _) in INTEGER_VIEWS.items() if name == tensor.dtype)
    signed = tensor.bits.view(f"i{tensor.bits.itemsize}")
    return torch.from_numpy(signed.copy()).view(dtype).view(tensor.shape)


def rows_of(tensor: Stored, rows: list[int]) -> Stored:
    """The given rows of a matrix, in that order."""
    bits = tensor.bits.reshape(tensor.shape)[rows]
    return Stored(tensor.dtype, bits.shape, np.ascontiguousarray(bits).reshape(-1))


def read_all(*folders: Path) -> list[dict[str, Stored]]:
    return [expectation.read(folder) for folder in folders]


def wanted(method: str, base: Model, subs: Sequence[Model], **options) -> dict[str, Stored]:
    """The expected tensors of a merge, of folders or of tensors read already."""
    base, *subs = [expectation.read(model) if isinstance(model, Path) else model for model in (base, *subs)]
    return expectation.expected(subs, base if method.endswith("resampling") else None, **options)
