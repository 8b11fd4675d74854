"""Finished folders: written aside, renamed once complete, each with a record of what it holds.

What an interrupted run leaves behind starts with a dot and ends with `.unfinished`; the next run removes it.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from order_study.errors import StudyError


class FolderRecord(BaseModel):
    """What a folder holds and that this program wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    written_by: Literal["order_study"] = "order_study"


Record = TypeVar("Record", bound=FolderRecord)


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


def read_record(folder: Path, name: str, kind: type[Record]) -> Record | None:
    """The record in a folder, or None where there is no folder or its record is of another version.

    Raises:
        StudyError: The folder holds something else, which must not be overwritten.
    """
    if not folder.exists():
        return None
    path = folder / name
    try:
        content = json.loads(path.read_bytes())
        ours = content["written_by"] == FolderRecord().written_by
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if not ours:
        raise StudyError(
            f"a folder is only replaced if this program wrote it, but {folder} has no {name} that says so: "
            "move it away, or choose another folder with --out"
        )
    try:
        return kind.model_validate(content)
    except ValidationError:
        return None


def write_record(folder: Path, name: str, record: FolderRecord) -> None:
    """Write a record into a folder."""
    (folder / name).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
