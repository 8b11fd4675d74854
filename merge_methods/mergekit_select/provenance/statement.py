"""The files of provenance: in-toto Statement v1 with SLSA provenance v1, and the table of tensors.

A lock is the ``buildDefinition`` of a statement alone. docs/provenance.md describes every field.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

MOST_BYTES = 1 << 63  # of a file or a merge; more is no size
MAJOR = 1  # of the formats below; a reader refuses any other
BUILD_TYPE: Final = "https://github.com/mergekit-select/mergekit-select/merge/v1"
TENSOR_TABLE: Final = "https://github.com/mergekit-select/mergekit-select/tensors/v1"
BUILDER = "https://github.com/mergekit-select/mergekit-select"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"

_LENGTHS = {"sha256": 64, "gitBlob": 40, "gitCommit": 40}  # hexadecimal digits
_URI = re.compile(r"pkg:huggingface/[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}(#.+)?|pkg:pypi/[\w.-]+@[\w.+!-]+|file:.+")

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Reproducible = Literal["bits", "bits on the same platform", "random", "unknown"]


def relative(path: str) -> str:
    """Return a file's path within a folder; refuse one that leads out of it."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith(("/", "~")) or ".." in parts or "\\" in path or ":" in parts[0] or "\0" in path:
        raise ValueError(f"must be a relative path without '..', got {path!r}")
    return path


def _digest(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        length = _LENGTHS.get(name)
        if length is None:
            raise ValueError(f"must be of {', '.join(_LENGTHS)}, got {name!r}")
        if not re.fullmatch(rf"[0-9a-f]{{{length}}}", text):
            raise ValueError(f"{name} must have {length} hexadecimal digits, got {text!r}")
    return value


def _uri(value: str) -> str:
    if not _URI.fullmatch(value):
        raise ValueError(
            f"must be pkg:huggingface/OWNER/NAME@COMMIT, pkg:pypi/NAME@VERSION or file:PATH, got {value!r}"
        )
    _, separator, file = value.partition("#")
    if separator:
        relative(unquote(file))
    return value


class _Model(BaseModel):
    """Fields in camel case; what a later minor version adds is ignored, as SLSA asks of readers."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


Digest = Annotated[dict[str, str], AfterValidator(_digest)]
Uri = Annotated[str, AfterValidator(_uri)]


class Resource(_Model):
    """in-toto's ResourceDescriptor: a model, one of its files, or a package."""

    name: str | None = None
    uri: Uri | None = None
    digest: Digest | None = None
    annotations: dict[str, Any] | None = None


class Subject(_Model):
    """What was made: all files together under the name ``.``, then each."""

    name: Annotated[str, AfterValidator(lambda name: name if name == "." else relative(name))]
    digest: Digest


class RecipeText(_Model):
    """The recipe, verbatim."""

    text: str
    sha256: Sha256

    @model_validator(mode="after")
    def _agree(self) -> RecipeText:
        found = text_digest(self.text)
        if found != self.sha256:
            raise ValueError(f"text must have the sha256 that stands beside it, {self.sha256}, and has {found}")
        return self


class External(_Model):
    """What a person chose."""

    recipe: RecipeText
    options: dict[str, bool | int | str | None]
    reproducible: Reproducible


class Internal(_Model):
    """What this package chose."""

    draws: int


class BuildDefinition(_Model):
    """SLSA's BuildDefinition: everything that a merge is made from. A lock holds this alone."""

    build_type: Literal["https://github.com/mergekit-select/mergekit-select/merge/v1"]
    external_parameters: External
    internal_parameters: Internal
    resolved_dependencies: list[Resource]

    @property
    def recipe(self) -> str:
        """The recipe's text."""
        return self.external_parameters.recipe.text


class Builder(_Model):
    """What ran."""

    id: str
    version: dict[str, str]


class Metadata(_Model):
    """When it ran."""

    started_on: str | None = None
    finished_on: str | None = None


class RunDetails(_Model):
    """SLSA's RunDetails."""

    builder: Builder
    metadata: Metadata
    byproducts: list[Resource]


class Predicate(_Model):
    """SLSA's provenance."""

    build_definition: BuildDefinition
    run_details: RunDetails


class Statement(_Model):
    """in-toto's Statement about one merge."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[Subject]
    predicate_type: Literal["https://slsa.dev/provenance/v1"]
    predicate: Predicate

    @property
    def definition(self) -> BuildDefinition:
        """What the merge was made from."""
        return self.predicate.build_definition


class TensorEntry(_Model):
    """One tensor: its identity wherever it lies."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    sha256: Sha256


class TensorTable(_Model):
    """The tensors of a merge, by name."""

    schema_: Literal["https://github.com/mergekit-select/mergekit-select/tensors/v1"] = Field(alias="schema")
    tensors: dict[str, TensorEntry]


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
