"""What was measured of a model, on disk beside the key of what it was measured from."""

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from order_study.folders import FolderRecord

What = Literal["held_out", "training", "exact_match", "weights"]


class Key(BaseModel):
    """All that a measurement depends on; one with another key is made anew."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    program: Literal[1] = 1  # raised when a change to the program changes what it measures
    what: What
    model_sha256: str
    other_sha256: str  # of the samples, or of the base that the weights are compared with
    batch_size: int = 0  # what follows decides nothing for weights
    max_new_tokens: int = 0
    threads: int = 0
    device: str = ""


class Entry(FolderRecord):
    """One measurement of one model: of its fields, those that `key.what` is about."""

    key: Key
    total: list[float] | None = None  # held_out, training: nats of each sample, over its response tokens
    tokens: list[int] | None = None  # held_out, training: how many these are
    answers: list[str] | None = None  # exact_match: what the model answered to each prompt
    equal_to_base: float | None = None  # weights: share of parameters


def read_entry(file: Path, key: Key) -> Entry | None:
    """The measurement in a file, or None where there is none with that key."""
    try:
        entry = Entry.model_validate(json.loads(file.read_bytes()))
    except (OSError, ValueError, ValidationError):
        return None
    return entry if entry.key == key else None


def write_entry(file: Path, entry: Entry) -> None:
    """Write a measurement, which takes its name once it is complete."""
    # json, not pydantic: a loss that is not a number must come back as such, and be reported by its model's name.
    write_whole(file, json.dumps(entry.model_dump(exclude_none=True)).encode() + b"\n")


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
