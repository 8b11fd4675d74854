"""Read and write the files of provenance; a file that breaks a rule of its format is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.inputs.files import RECORDS, read_json, write_whole
from mergekit_select.provenance.parents import parents_of, require_same_models
from mergekit_select.provenance.statement import (
    BUILD_TYPE,
    MAJOR,
    TENSOR_TABLE,
    BuildDefinition,
    Statement,
    TensorTable,
)

STATEMENT, TENSORS = RECORDS

Document = TypeVar("Document", BuildDefinition, Statement, TensorTable)


def read_document(path: Path, kind: type[Document]) -> Document:
    """Read a lock, a statement or a table of tensors.

    Raises:
        UnreadableError: It cannot be read, is of another version, or breaks a rule of the format.
    """
    content = read_json(path)
    _require_version(path, content, kind)
    try:
        document = kind.model_validate(content)
    except ValidationError as error:
        problem = one_line(error).replace("Value error, ", "")
        raise UnreadableError(f"{path}: {problem}; get the file again, or make it anew") from error
    definition = document.definition if isinstance(document, Statement) else document
    if isinstance(definition, BuildDefinition):
        require_same_models(definition.recipe, str(path), parents_of(definition.resolved_dependencies))
    return document


def read_definition(path: Path) -> BuildDefinition:
    """Read what a merge was made from, from a lock or a statement.

    Raises:
        UnreadableError: As for ``read_document``.
    """
    if "_type" in read_json(path):
        return read_document(path, Statement).definition
    return read_document(path, BuildDefinition)


def write_document(path: Path, document: BaseModel) -> None:
    """Write one of the above in one step: a reader never finds half of it.

    Raises:
        UnreadableError: It cannot be written.
    """
    content = document.model_dump(mode="json", by_alias=True, exclude_none=True)
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 in one step, line endings as they are.

    Raises:
        UnreadableError: It cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise UnreadableError(f"cannot write {path}: {error.strerror}") from error


def _require_version(path: Path, content: dict[str, Any], kind: type[Any]) -> None:
    """Refuse another version by saying so, and not that some field is wrong."""
    place, expected, found = "schema", TENSOR_TABLE, content.get("schema")
    if kind is not TensorTable:
        inner = content
        for key in ("predicate", "buildDefinition") if kind is Statement else ():
            inner = inner.get(key) if isinstance(inner.get(key), dict) else {}  # type: ignore[assignment]
        place, expected, found = "buildType", BUILD_TYPE, inner.get("buildType")
    if found == expected:
        return
    if isinstance(found, str) and found.rpartition("/")[0] == expected.rpartition("/")[0]:
        raise UnreadableError(f"{path}: {place} must end in v{MAJOR}, got {found!r}; install a later mergekit-select")
    raise UnreadableError(f"{path}: {place} must be {expected!r}, got {found!r}; give a file that this package wrote")
