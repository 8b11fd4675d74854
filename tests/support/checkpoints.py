"""Checkpoints on disk: reading all tensors, copying with changes, and the forms that people bring them in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mergekit_select import bits

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]  # changes the tensors of a checkpoint in place

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a safetensors checkpoint, read without mergekit."""
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}


def digests(folder: Path) -> dict[str, str]:
    """A digest of every tensor's dtype, shape and bits."""
    return {name: bits.digest(tensor) for name, tensor in tensors_of(folder).items()}


def save(folder: Path, tensors: Tensors) -> Path:
    """Write the tensors of an unsharded checkpoint anew; return the folder."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def changed(folder: Path, change: Change) -> Path:
    """Change the tensors of an unsharded checkpoint where it lies."""
    tensors = tensors_of(folder)
    change(tensors)
    return save(folder, tensors)


def copied(source: Path, target: Path, change: Change | None = None, **config: Any) -> Path:
    """Copy a checkpoint, with tensors changed (and then unsharded) and other values in its config."""
    if change is None:
        shutil.copytree(source, target)
    else:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        tensors = tensors_of(source)
        change(tensors)
        save(target, tensors)
    if config:
        edit_json(target / "config.json", **config)
    return target


def without(*missing: str) -> Change:
    """A change that removes tensors."""

    def drop(tensors: Tensors) -> None:
        for name in missing:
            del tensors[name]

    return drop


def in_dtype(dtype: torch.dtype) -> Change:
    """A change that casts all tensors."""
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


def edit_json(file: Path, **keys: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def reshard(source: Path, target: Path, count: int) -> Path:
    """Copy a checkpoint, its tensors dealt out to another number of shards."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(source)
    weight_map: dict[str, str] = {}
    for part in range(count):
        names = sorted(tensors)[part::count]
        shard = f"model-{part + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, target / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def pickled(source: Path, target: Path) -> Path:
    """Copy a checkpoint, stored as torch pickles it."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(tensors_of(source), target / "pytorch_model.bin")
    return target


def tied(source: Path, target: Path) -> Path:
    """Copy a Llama, with its head tied to the embeddings."""
    return copied(source, target, without("lm_head.weight"), tie_word_embeddings=True)


def finished(folder: Path) -> bool:
    """Whether a folder looks like a model: a config, or weights under the name that transformers loads."""
    return any(
        (folder / file).exists()
        for file in ("config.json", "model.safetensors", "model.safetensors.index.json", "mergekit_config.yml")
    )


@contextmanager
def weight_map(folder: Path) -> Iterator[dict[str, str]]:
    """The files of an index by the tensors they hold, written back as the caller leaves them."""
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    yield index["weight_map"]
    file.write_text(json.dumps(index))
