"""Compare the weights of two checkpoints on disk, bit by bit."""

import math
from pathlib import Path

import torch
from safetensors import safe_open

from examples.order_study.errors import StudyError

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare(model: Path, base: Path) -> tuple[float, float]:
    """The share of a model's parameters that have the bits of the base's, and its distance from the base.

    Resampling draws again where a sub-model's value equals the base's, so the share is where it can act. The distance
    is the Euclidean norm of the difference of all parameters.

    Raises:
        StudyError: The checkpoints differ in tensors, shapes or dtypes, where equality means nothing.
    """
    files, base_files = _tensor_files(model), _tensor_files(base)
    if files.keys() != base_files.keys():
        odd = min(files.keys() ^ base_files.keys())
        raise StudyError(
            f"two checkpoints must hold the same tensors to be compared, but only one of {model} and {base} "
            f"has {odd}: compare models of one architecture"
        )
    equal, total, square = 0, 0, 0.0
    for name in files:
        one, other = _read(files[name], name), _read(base_files[name], name)
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            raise StudyError(
                f"two checkpoints must agree in shape and dtype to be compared, but {name} is "
                f"{_form(one)} in {model} and {_form(other)} in {base}: save both alike"
            )
        bits = _INTEGER[one.element_size()]
        equal += int((one.view(bits) == other.view(bits)).sum())
        total += one.numel()
        square += float((one.float() - other.float()).double().square().sum())
    return equal / total, math.sqrt(square)


def _tensor_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    return files


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
