"""Digests that tell whether a model or a list of samples is still the one that something was made from."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from order_study.errors import StudyError
from order_study.folders import file_digest
from order_study.tokens import Sample


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights of a checkpoint; over the shards and their names where there are several.

    Raises:
        StudyError: The folder has no safetensors weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StudyError(
            f"a model must be a folder with safetensors weights, but {folder} has none: train or merge it again"
        )
    digests = {file.name: _digest(file) for file in files}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def model_digest(folder: Path) -> str:
    """SHA-256 of all that decides what a checkpoint computes: its weights and its configuration."""
    config = file_digest(folder / "config.json")
    return hashlib.sha256(f"{weights_digest(folder)} {config}".encode()).hexdigest()


def samples_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of samples as tokens, with their labels and their order."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(json.dumps([sample["input_ids"], sample["labels"]]).encode())
    return total.hexdigest()


def _digest(file: Path) -> str:
    state = file.stat()
    return _digest_of(file.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)


@functools.cache
def _digest_of(file: Path, *_state: int) -> str:
    """The digest of a file in a state: models are input to many merges, and large."""
    return file_digest(file)
