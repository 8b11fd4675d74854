"""Where the samples of a study come from, as settings: text that CPython carries, files, or a data set of the hub."""

import math
import string
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

Count = Annotated[int, Field(ge=1)]
Skip = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


def fields(template: str) -> list[str]:
    """The names of the fields in a template, in their order."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def _template(value: str) -> str:
    try:
        names = fields(value)
    except ValueError as error:
        raise ValueError(
            f"a template must be text with fields in braces, but {value!r} cannot be read ({error}): write {{{{ "
            "and }} for braces that stand for themselves"
        ) from error
    if not names:
        raise ValueError(f"a template must name a field of the data, got {value!r}: write for example {{question}}")
    for name in names:
        if not name.isidentifier():
            raise ValueError(
                f"a template names fields of the data, but {value!r} has {{{name}}}: put the name of a field there, "
                "and write {{ and }} for braces that stand for themselves"
            )
    return value


def unset(value: Any) -> bool:
    """Whether a setting was left out; then results.json leaves it out too, as it did before there was one."""
    return not value


Template = Annotated[str, AfterValidator(_template)]


class Frozen(BaseModel):
    """What never changes once it is made, and takes no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Text(Frozen):
    """`pydoc_data.topics`, which every CPython carries. Shares are of the groups of passages, not of their length."""

    source: Literal["pydoc_data.topics"] = "pydoc_data.topics"
    topics: Count | None = None  # the longest n; None: all
    passage_characters: Count = 400
    base: Fraction = 0.45
    held_out: Fraction = 0.15

    @model_validator(mode="after")
    def _leaves_fine_tuning(self) -> Self:
        if self.base + self.held_out >= 1:
            raise ValueError(
                f"base + held_out must stay below 1, got {self.base} + {self.held_out}: lower one of them, "
                "so that something is left to fine-tune on"
            )
        return self


class TextFile(Frozen):
    """A file that a fresh base is trained on: JSON lines made into passages, or plain text cut into them."""

    path: Name
    template: Template | None = None  # makes a passage of a JSON record; None: the file is plain text
    passage_characters: Count = 400  # of plain text
    skip: Skip = 0  # records of JSON, passages of plain text
    take: Count | None = None


class _Pairs(Frozen):
    """Records made into prompts and responses. `skip` and `take` are of the training records, in their order."""

    prompt: Template
    response: Template
    skip: Skip = 0
    take: Count | None = None
    held_out_share: Fraction | None = None  # of the training records that were taken
    held_out_take: Count | None = None
    # Of the records for validation. To take these from the training records, name those again and skip what is taken.
    validation_skip: Skip = Field(default=0, exclude_if=unset)
    validation_take: Count | None = Field(default=None, exclude_if=unset)
    # Seed of a permutation of the records of each part, before any is skipped or taken; None: as they are in the file.
    shuffle: Annotated[int, Field(ge=0)] | None = Field(default=None, exclude_if=lambda value: value is None)
    # The prompt is put to the tokenizer's chat template as what the user says.
    chat_template: bool = Field(default=False, exclude_if=unset)
    # Samples with more are left out, as are those longer than the context; None: the context alone decides.
    max_tokens: Count | None = Field(default=None, exclude_if=unset)

    def _one_of(self, name: str) -> Self:
        value, share = getattr(self, name), self.held_out_share
        if (value is None) == (share is None):
            raise ValueError(
                f"what is held out is named by {name} or drawn as held_out_share, got "
                f"{'neither' if value is None else 'both'}: give one of them"
            )
        return self

    def _apart(self, train: str, held_out: str | None, validation: str | None) -> Self:
        """Refuse records of one file or split that two parts would take."""
        taken = {
            "training": (train, self.skip, self.take),
            "what is held out": (held_out, 0, self.held_out_take),
            "validation": (validation, self.validation_skip, self.validation_take),
        }
        two_of_them = combinations(taken.items(), 2)
        for (one, (source, start, count)), (other, (its_source, its_start, its_count)) in two_of_them:
            first, end = max(start, its_start), min(_end(start, count), _end(its_start, its_count))
            if source is not None and source == its_source and first < end:
                raise ValueError(
                    f"no record may serve both {one} and {other}, but both take record {first} of {source} (counted "
                    "from 0, once shuffled): name another source, or change skip, take, held_out_take, validation_skip "
                    "or validation_take"
                )
        return self


def _end(start: int, count: int | None) -> float:
    return math.inf if count is None else start + count


class JsonLines(_Pairs):
    """Files of one JSON object per line; `${NAME}` in a path stands for an environment variable."""

    source: Literal["jsonl"]
    train: Name
    held_out: Name | None = None
    validation: Name | None = Field(default=None, exclude_if=unset)  # what the best sub-model and a soup are chosen on

    @model_validator(mode="after")
    def _parts_are_apart(self) -> Self:
        return self._one_of("held_out")._apart(self.train, self.held_out, self.validation)


class HubDataset(_Pairs):
    """A data set that the package `datasets` loads, by its id on the hub or from a folder."""

    source: Literal["datasets"]
    id: Name
    name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    held_out_split: str | None = None
    validation_split: str | None = Field(default=None, exclude_if=unset)

    @model_validator(mode="after")
    def _parts_are_apart(self) -> Self:
        return self._one_of("held_out_split")._apart(self.train_split, self.held_out_split, self.validation_split)


Data = Annotated[Text | JsonLines | HubDataset, Field(discriminator="source")]
