"""A model in a local folder: its config, and the names, dtypes and shapes of its tensors, from headers alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch

from mergekit_select import kinds
from mergekit_select.bits import dtype_name
from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.findings import UnusableModelError, some
from mergekit_select.inputs.bounds import require_regular, require_regular_files
from mergekit_select.inputs.files import INDEXES, MERGEKIT_LOADS, first_loaded, read_json, read_weight_map

# safetensors' name of a dtype, torch's, bits of an element; in safetensors' own order, by which it places tensors
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
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}

_SAVED = re.compile(r"checkpoint-\d+")  # a state that transformers' Trainer saves within its folder


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor's description.

    Attributes:
        dtype: torch's name, such as ``bfloat16``.
        shape: Elements along each axis.
        nbytes: Size of its data.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """One model's description.

    Attributes:
        name: As the recipe calls it.
        folder: Where its config and tokenizer files lie.
        config: Its config.json.
        tensors: By name; None where they cannot be known without a download.
        files: Identities of its weight files (device and inode, or hub id and commit).
        plain: Whether mergekit can read names from ``folder`` itself without unpickling or downloading anything.
        pickle: The file of its weights if that is a pickle, or an index of pickles; empty on a hub.
        ambiguous: An index and a single file that lie in one folder, where they do.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] | None
    files: frozenset[object] = field(default_factory=frozenset)
    plain: bool = True
    pickle: str | None = None
    ambiguous: tuple[str, str] | None = None

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor, as far as config.json says."""
        return bool(self.config.get("tie_word_embeddings", False))


def read_checkpoint(name: str, folder: Path) -> Checkpoint:
    """Describe the model in a local folder.

    Args:
        name: As the recipe calls it.
        folder: The model's folder.

    Raises:
        UnusableModelError: It is no model that mergekit could merge.
    """
    if not folder.is_dir():
        gguf = folder.suffix.lower() in (".gguf", ".ggml")
        raise UnusableModelError(kinds.MODEL_IS_GGUF if gguf else kinds.MODEL_IS_FILE)
    try:
        require_regular_files(folder)
        weights = _weights_file(name, folder)
        config = read_json(folder / "config.json")
        tensors, shards = _read_weights(folder, weights)
        files = frozenset((status.st_dev, status.st_ino) for status in (os.stat(folder / shard) for shard in shards))
    except UnusableModelError:
        raise
    except (UnreadableError, OSError) as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        kind = kinds.MODEL_INCOMPLETE if missing else kinds.MODEL_UNREADABLE
        raise UnusableModelError(kind, problem=one_line(error, 1000)) from error
    pickled = ".bin" in weights
    single = weights.removesuffix(".index.json")
    both = weights in INDEXES and (folder / single).exists()
    return Checkpoint(
        name,
        folder,
        config,
        tensors,
        files,
        plain=not pickled,
        pickle=weights if pickled else None,
        ambiguous=(weights, single) if both else None,
    )


def _weights_file(name: str, folder: Path) -> str:
    """Return the file that mergekit begins with."""
    names = {path.name for path in folder.iterdir()}
    weights = first_loaded(MERGEKIT_LOADS, names)
    if weights is not None:
        return weights
    ggufs = sorted(file for file in names if file.endswith(".gguf"))
    if ggufs:
        raise UnusableModelError(kinds.MODEL_HAS_GGUF, folder=folder, files=some(ggufs))
    if "adapter_config.json" in names:
        raise UnusableModelError(kinds.MODEL_IS_ADAPTER, name=name)
    saved = [name for name in names if _SAVED.fullmatch(name)]
    if saved:
        last = max(saved, key=lambda name: int(name.rpartition("-")[2]))
        raise UnusableModelError(kinds.MODEL_IS_RUN, folder=folder, last=folder / last)
    raise UnusableModelError(kinds.MODEL_WITHOUT_WEIGHTS, folder=folder)


def _read_weights(folder: Path, weights: str) -> tuple[dict[str, StoredTensor], list[str]]:
    if weights not in INDEXES:
        return read_shard(folder / weights), [weights]
    index = read_weight_map(folder / weights)
    shards = sorted(set(index.values()))
    tensors = {}
    for shard in shards:
        held = read_shard(folder / shard, f", which {weights} names")
        listed = [name for name, place in index.items() if place == shard]
        missing = [name for name in listed if name not in held]
        if missing:
            raise UnreadableError(
                f"{weights} places {some(missing)} in {shard}, and {folder / shard} has no such tensor"
            )
        tensors.update({name: held[name] for name in listed})
    return tensors, shards


def read_shard(path: Path, named_by: str = "") -> dict[str, StoredTensor]:
    """Return the tensors of one file, by its suffix a pickle or safetensors.

    Raises:
        UnreadableError: It is missing, or not what it should be.
    """
    if not path.exists():
        raise UnreadableError(f"there is no {path}{named_by}") from FileNotFoundError(path)
    return _read_pickle(path) if path.suffix == ".bin" else read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, StoredTensor], Mapping[str, str] | None]:
    """Return the tensors and metadata of a safetensors file; the library compares its header with its size.

    Raises:
        UnreadableError: The file cannot be read, is truncated, or its header is none or lies.
    """
    try:
        require_regular(path)  # safetensors takes a lack of permission for a lack of the file, and waits for a pipe
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: _stored(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()
    except OSError as error:
        raise UnreadableError(f"cannot read {path}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise UnreadableError(f"{path} is no whole safetensors file: {one_line(error)}") from error


def _stored(path: Path, name: str, described: Any) -> StoredTensor:
    return stored_tensor(name, described.get_dtype(), described.get_shape(), f"the header of {path}")


def stored_tensor(name: str, dtype: str, shape: list[int], source: str) -> StoredTensor:
    """Describe a tensor whose dtype is given by safetensors' name.

    Raises:
        UnreadableError: There is no such dtype in torch.
    """
    if dtype not in DTYPES:
        raise UnreadableError(f"{source} gives {name} the dtype {dtype!r}, which mergekit does not read")
    torch_name, bits = DTYPES[dtype]
    return StoredTensor(torch_name, tuple(shape), math.prod(shape) * bits // 8)


def _read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Describe a pickled checkpoint's tensors; on the meta device no data is read, and weights_only runs no code."""
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # whatever a file that is no checkpoint makes the unpickler raise
        cause = str(error).split("\n", 1)[0]
        raise UnreadableError(f"{path} holds more than tensors, or is no PyTorch checkpoint: {cause}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise UnreadableError(f"{path} must hold tensors by name, and holds {type(state).__name__}")
    return {
        str(name): StoredTensor(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.nbytes)
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }
