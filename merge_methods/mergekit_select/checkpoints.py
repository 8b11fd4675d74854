"""A model as ``check`` sees it: its config, and the names, dtypes and shapes of its tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_select.findings import Findings, some
from mergekit_select.safetensors_header import CheckpointError, Tensor, read_header

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
MOST_JSON_BYTES = 256 << 20


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
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None
    files: frozenset[object] = field(default_factory=frozenset)
    plain: bool = True

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor, as far as config.json says."""
        return bool(self.config.get("tie_word_embeddings", False))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object of bounded size.

    Raises:
        CheckpointError: The file cannot be read, is no JSON, or holds something else.
    """
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise CheckpointError(f"{path} must be JSON of at most {MOST_JSON_BYTES} bytes, and is larger")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON, and is not: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, and holds {type(value).__name__}")
    return value


def open_folder(name: str, folder: Path, place: str, findings: Findings) -> Checkpoint | None:
    """Read a local model's description, or add why it cannot be merged.

    Args:
        name: As the recipe calls it.
        folder: The model's folder.
        place: Recipe key that names it.
        findings: Where to add what is wrong.
    """
    if not folder.is_dir():
        kind = "model-quantised" if folder.suffix.lower() in (".gguf", ".ggml") else "model-missing"
        findings.error(
            kind,
            place,
            name,
            "a local model must be a folder in Hugging Face format, and this is a file",
            "give the folder with config.json and safetensors",
        )
        return None
    try:
        config = read_json(folder / "config.json")
        weights = _weights_file(name, folder, place, findings)
        if weights is None:
            return None
        tensors, shards = _read_weights(folder, weights)
    except CheckpointError as error:
        kind = "model-missing" if isinstance(error.__cause__, FileNotFoundError) else "model-unreadable"
        findings.error(kind, place, name, str(error), "copy or download the model again")
        return None
    pickled = ".bin" in weights
    if pickled:
        findings.warning(
            "model-pickled",
            place,
            name,
            f"{weights} is a pickle; check unpickles its tensors' descriptions only, with weights_only",
            "store the model as safetensors",
        )
    files = frozenset((status.st_dev, status.st_ino) for status in (os.stat(folder / shard) for shard in shards))
    return Checkpoint(name, folder, config, tensors, files, plain=not pickled)


def _weights_file(name: str, folder: Path, place: str, findings: Findings) -> str | None:
    """The file that mergekit begins with: safetensors before pickles, an index before a single file."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        index, single = folder / f"{file}.index.json", folder / file
        if index.exists() and single.exists():
            findings.warning(
                "model-ambiguous",
                place,
                name,
                f"{folder} holds both {index.name}, which mergekit reads, and {single.name}, which transformers loads",
                "remove the one that is left from an earlier merge or download",
            )
        if index.exists() or single.exists():
            return index.name if index.exists() else single.name
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        message = f"mergekit reads no GGUF files, and {folder} has only {some(ggufs)}"
        findings.error("model-quantised", place, name, message, "merge the original model, and convert the result")
    elif (folder / "adapter_config.json").exists():
        message = "the folder is a LoRA adapter, not a model"
        findings.error("model-missing", place, name, message, f"write BASE+{name}, and give --lora-merge-cache")
    else:
        findings.error(
            "model-missing",
            place,
            name,
            f"{folder} has neither model.safetensors nor pytorch_model.bin, whole or with an index",
            "copy or download the model again",
        )
    return None


def _read_weights(folder: Path, weights: str) -> tuple[dict[str, Tensor], list[str]]:
    if not weights.endswith(".index.json"):
        return read_shard(folder / weights), [weights]
    index = read_json(folder / weights).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise CheckpointError(f"{folder / weights} must map tensors to shards under weight_map, and does not")
    shards = sorted(set(index.values()))
    tensors = {}
    for shard in shards:
        held = read_shard(folder / shard, f", which {weights} names")
        listed = [name for name, place in index.items() if place == shard]
        missing = [name for name in listed if name not in held]
        if missing:
            raise CheckpointError(
                f"{weights} places {some(missing)} in {shard}, and {folder / shard} has no such tensor"
            )
        tensors.update({name: held[name] for name in listed})
    return tensors, shards


def read_shard(path: Path, named_by: str = "") -> dict[str, Tensor]:
    """Return the tensors of one file, by its suffix a pickle or safetensors.

    Raises:
        CheckpointError: It is missing, or not what it should be.
    """
    if not path.exists():
        raise CheckpointError(f"there is no {path}{named_by}") from FileNotFoundError(path)
    return _unpickle(path) if path.suffix == ".bin" else read_header(path)


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Describe a pickled checkpoint's tensors; on the meta device no data is read, and weights_only runs no code."""
    import torch

    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # whatever a file that is no checkpoint makes the unpickler raise
        cause = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{path} holds more than tensors, or is no PyTorch checkpoint: {cause}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold tensors by name, and holds {type(state).__name__}")
    return {
        str(name): Tensor(str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel() * t.element_size())
        for name, t in state.items()
        if isinstance(t, torch.Tensor)
    }
