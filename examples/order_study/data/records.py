"""Records of named fields, read from JSON lines or from a data set of the hub, and made into text by templates."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from examples.order_study.errors import StudyError
from examples.order_study.sources import HubDataset, fields

Record = tuple[str, dict[str, Any]]  # where it was found, for messages, and its fields
_Item = TypeVar("_Item")


def expand(path: str) -> Path:
    """A path with its environment variables replaced.

    Raises:
        StudyError: A variable is not set.
    """
    return Path(with_variables(path)).expanduser()


def with_variables(path: str) -> str:
    """A path or an id of the hub with its environment variables replaced.

    Raises:
        StudyError: A variable is not set.
    """
    for name in re.findall(r"\$\{(\w+)\}", path):
        if name not in os.environ:
            raise StudyError(
                f"a path may name environment variables that are set, but {name} in {path!r} is not: set it, for "
                f"example with export {name}=/path/to/data"
            )
        path = path.replace(f"${{{name}}}", os.environ[name])
    return path


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        StudyError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"the data is read from files, but {path} cannot be read ({error.strerror}): check the path, which is "
            "relative to the current directory"
        ) from error
    except UnicodeDecodeError as error:
        raise StudyError(
            f"the data must be text in UTF-8, but {path} has {error.object[error.start : error.start + 1]!r} at "
            f"byte {error.start}: convert the file"
        ) from error


def read_json_lines(path: Path) -> Iterator[Record]:
    """The records of a file with one JSON object per line; empty lines are skipped.

    Not by `datasets` or pandas: both take text that looks like a date for a date, and name no line.

    Raises:
        StudyError: A line holds something else.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                record = error
            if not isinstance(record, dict):
                why = f"it is not JSON ({record})" if isinstance(record, ValueError) else "it has no named fields"
                raise StudyError(
                    f"each line must be a JSON object, but line {number} of {path} is {line[:60]!r}, and {why}: mend "
                    "or remove it"
                )
            yield f"line {number} of {path}", record


def read_hub(source: HubDataset, split: str) -> list[Record]:
    """The records of one split of a data set.

    Raises:
        StudyError: The package `datasets` is missing, or cannot load it.
    """
    try:
        import datasets  # heavy, and needed for this source alone
    except ImportError as error:
        raise StudyError(
            f"the data set {source.id} is loaded by the package datasets, which cannot be imported ({error}): "
            "pip install '.[study]', or name JSON lines by path"
        ) from error
    try:
        rows = datasets.load_dataset(source.id, source.name, revision=source.revision, split=split)
    except Exception as error:  # of any kind: a data set that is not there, no network, a faulty file
        raise StudyError(
            f"a data set must be one that the package datasets loads, but split {split!r} of {source.id} "
            f"(name {source.name!r}) is not ({type(error).__name__}: {error}): check id, name and split, and that "
            "HF_HUB_OFFLINE is not set where it must be downloaded"
        ) from error
    return [(f"row {number} of {source.id}, split {split}", dict(row)) for number, row in enumerate(rows)]


def chosen(items: list[_Item], skip: int, take: int | None, what: str) -> list[_Item]:
    """The items after the first `skip`, and `take` of them.

    Raises:
        StudyError: There are not that many.
    """
    if len(items) - skip < (take or 1):
        raise StudyError(
            f"{what} must have as many as are taken, but take {take or 'all'} after skip {skip} asks for more than "
            f"the {len(items)} there are: lower one of them"
        )
    return items[skip:] if take is None else items[skip : skip + take]


def fill(record: Record, template: str, empty: bool = True) -> str:
    """A template with the fields of a record put in.

    Raises:
        StudyError: The record has no such field, cannot be put in as the template says, or gives no text where
            `empty` is false.
    """
    place, values = record
    texts = {name: _text(place, values, name) for name in fields(template)}
    try:
        filled = template.format(**texts)
    except ValueError as error:
        raise StudyError(
            f"a template takes fields as text, but {template!r} cannot be filled from {place} ({error}): "
            "write {name} without a format"
        ) from error
    if not empty and not any(text.strip() for text in texts.values()):
        raise StudyError(
            f"a response must not be empty, as there is nothing to learn from it, but {place} gives {filled!r}: "
            "remove the record or mend it"
        )
    return filled


def _text(place: str, values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if value is None:
        there = ", ".join(repr(key) for key, value in values.items() if value is not None) or "none"
        raise StudyError(
            f"a record must have the fields that the templates name, but {place} has no {name!r} (fields there: "
            f"{there}): change the template or mend the data"
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
