"""Read the header of a safetensors file: names, dtypes and shapes, never a tensor.

Format: https://huggingface.co/docs/safetensors, "Format": 8 bytes of header length, little-endian; a JSON header; data.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from mergekit_select.errors import MergekitSelectError

MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

# safetensors dtype: torch's name, bits
DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "C64": ("complex64", 64),
}


class CheckpointError(MergekitSelectError):
    """A checkpoint's file that is not what it should be."""


@dataclass(frozen=True)
class Tensor:
    """A stored tensor's description.

    Attributes:
        dtype: torch's name, such as ``bfloat16``.
        shape: Elements along each axis.
        nbytes: Size of its data.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors that a safetensors file holds, having compared the header with the file's size.

    Raises:
        CheckpointError: The file cannot be read, is truncated, or its header is none or lies.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated: {size} bytes, and its header alone is said to have {length}"
                    if size >= 8
                    else f"{path} is no safetensors file: it has {size} bytes"
                )
            if length > MOST_HEADER_BYTES:
                raise CheckpointError(f"{path} has a header of {length} bytes; at most {MOST_HEADER_BYTES} are allowed")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"the header of {path} must have text by name in __metadata__, and has other values")
    return _tensors(path, entries, size - 8 - length)


def _tensors(path: Path, entries: dict[str, object], data_bytes: int) -> dict[str, Tensor]:
    result = {}
    spans = []
    for name, entry in entries.items():
        result[name], span = _tensor(path, name, entry)
        spans.append((*span, name))
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached:
            raise CheckpointError(
                f"the header of {path} lies: {name} begins at byte {start} of the data, "
                f"and the one before ends at {reached}"
            )
        reached = end
    if reached != data_bytes:
        problem = "is truncated" if reached > data_bytes else "has bytes that belong to no tensor"
        raise CheckpointError(f"{path} {problem}: its header describes {reached} bytes of data, it has {data_bytes}")
    return result


def _tensor(path: Path, name: str, entry: object) -> tuple[Tensor, tuple[int, int]]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"the header of {path} has no dtype, shape and data_offsets for {name}")
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"the header of {path} gives {name} the unknown dtype {entry['dtype']!r}")
    dtype, bits = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise CheckpointError(f"the header of {path} has {numbers!r} for {name} where whole numbers belong")
    nbytes = math.prod(shape) * bits // 8
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"the header of {path} lies: {name} of shape {shape} in {dtype} takes {nbytes} bytes, "
            f"and its offsets are {offsets}"
        )
    return Tensor(dtype, tuple(shape), nbytes), (offsets[0], offsets[1])
