"""Finished folders: written aside, renamed once complete, each with a record of what it was made from.

What an interrupted run leaves behind starts with a dot and ends with `.unfinished`; the next run removes it.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from examples.order_study.errors import StudyError
from examples.order_study.store.places import RECORD


class Record(BaseModel):
    """What a folder was made from, and that this program made it: no times and no places, so that equals are equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    written_by: Literal["order_study"] = "order_study"
    made_from: dict[str, Any]  # all that decides its content
    weights_sha256: str | None = None  # of a model
    made_with: dict[str, str] = {}  # versions, for who wonders why another machine gives other bits


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an error."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    _remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        discard(folder)
        unfinished.rename(folder)
    finally:
        _remove(unfinished)


def discard(folder: Path) -> None:
    """Delete a folder; it loses its name first, so that no half of it is ever taken for the whole."""
    if folder.exists():
        leaving = folder.with_name(f".{folder.name}.discarded.unfinished")
        _remove(leaving)
        folder.rename(leaving)
        _remove(leaving)


def read_record(folder: Path) -> Record | None:
    """The record in a folder, or None where there is no folder.

    Raises:
        StudyError: The folder holds something else, which must not be overwritten.
    """
    if not folder.exists():
        return None
    try:
        content = json.loads((folder / RECORD).read_bytes())
        ours = content["written_by"] == "order_study"
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if not ours:
        raise StudyError(
            f"a folder is only replaced if this program wrote it, but {folder} has no {RECORD} that says so: "
            "move it away, or choose another folder with --out"
        )
    try:
        return Record.model_validate(content)
    except ValidationError:  # of another version
        return Record(made_from={})


def write_record(folder: Path, record: Record) -> None:
    """Write a record into a folder."""
    write_whole(folder / RECORD, (record.model_dump_json(indent=2) + "\n").encode())


def is_made(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether a folder holds the model that is made from this, with the very weights that were saved."""
    record = read_record(folder)
    return (
        record is not None
        and record.made_from == made_from
        and any(folder.glob("*.safetensors"))
        and weights_digest(folder) == record.weights_sha256
    )


def write_whole(file: Path, content: bytes) -> bool:
    """Write a file aside and rename it, unless it has that content; return whether it was written."""
    if file.is_file() and file.read_bytes() == content:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def digest(value: Any) -> str:
    """SHA-256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


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
    digests = {file.name: file_digest(file) for file in files}
    return next(iter(digests.values())) if len(digests) == 1 else digest(digests)


def model_digest(folder: Path) -> str:
    """SHA-256 of all that decides what a checkpoint computes: its weights and its configuration."""
    return digest([weights_digest(folder), file_digest(folder / "config.json")])


def file_digest(file: Path) -> str:
    """SHA-256 of a file; one that has not changed since is not read again, as models are large and read by many."""
    state = file.stat()
    return _digest_of(file.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)


@functools.cache
def _digest_of(file: Path, *_state: int) -> str:
    total = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
