"""Records of named fields, read from JSON lines or from a data set of the hub, and made into text by templates."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from order_study.errors import StudyError
from order_study.example import Example
from order_study.sources import HubDataset, fields

Record = tuple[str, dict[str, Any]]  # where it was found, for messages, and its fields
_Item = TypeVar("_Item")


def expand(path: str) -> Path:
    """A path with its environment variables replaced.

    Raises:
        StudyError: A variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise StudyError(
                f"a path may name environment variables that are set, but {name} in {path!r} is not: set it, for "
                f"example with export {name}=/path/to/data"
            )
        return os.environ[name]

    return Path(re.sub(r"\$\{(\w+)\}", value, path)).expanduser()


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

    Raises:
        StudyError: A line holds something else.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise StudyError(
                f"each line must be a JSON object, but line {number} of {path} is not JSON ({error}): "
                f"{line[:60]!r}: mend or remove it"
            ) from error
        if not isinstance(record, dict):
            raise StudyError(
                f"each line must be a JSON object with named fields, but line {number} of {path} is "
                f"{line[:60]!r}: mend or remove it"
            )
        yield f"line {number} of {path}", record


def read_hub(source: HubDataset, split: str) -> list[Record]:
    """The records of one split of a data set.

    Raises:
        StudyError: The package `datasets` is missing, or cannot load it.
    """
    try:
        import datasets  # type: ignore[import-untyped]  # heavy, and needed for this source alone
    except ImportError as error:
        raise StudyError(
            f"the data set {source.id} is loaded by the package datasets, which cannot be imported ({error}): "
            "pip install datasets, or name JSON lines by path"
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
    left = len(items) - skip
    if left < (take or 1):
        raise StudyError(
            f"{what} must have as many as are taken, but take {take or 'all'} after skip {skip} asks for more than "
            f"the {len(items)} there are: lower one of them"
        )
    return items[skip:] if take is None else items[skip : skip + take]


def example(record: Record, prompt: str, response: str) -> Example:
    """A record as prompt and response.

    Raises:
        StudyError: A field is missing, or the response is empty.
    """
    place, _ = record
    made = Example(fill(record, prompt), fill(record, response))
    if not any(_text(record, name).strip() for name in fields(response)):
        raise StudyError(
            f"a response must not be empty, as there is nothing to learn from it, but {place} gives "
            f"{made.response!r}: remove the record or mend it"
        )
    return made


def fill(record: Record, template: str) -> str:
    """A template with the fields of a record put in.

    Raises:
        StudyError: The record has no such field, or cannot be put in as the template says.
    """
    try:
        return template.format(**{name: _text(record, name) for name in fields(template)})
    except ValueError as error:
        raise StudyError(
            f"a template takes fields as text, but {template!r} cannot be filled from {record[0]} ({error}): "
            "write {name} without a format"
        ) from error


def _text(record: Record, name: str) -> str:
    place, values = record
    if values.get(name) is None:
        there = ", ".join(repr(key) for key, value in values.items() if value is not None) or "none"
        raise StudyError(
            f"a record must have the fields that the templates name, but {place} has no {name!r} (fields there: "
            f"{there}): change the template or mend the data"
        )
    value = values[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
