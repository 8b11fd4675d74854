"""The three parts of the data as prompts and responses: for the base, for fine-tuning, and held out."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.order_study.data.records import Record, chosen, expand, fill, read_hub, read_json_lines, read_text
from examples.order_study.errors import StudyError
from examples.order_study.settings import FreshBase, Part, Study
from examples.order_study.sources import Data, HubDataset, JsonLines, Text, TextFile
from examples.order_study.store.folders import digest
from examples.quickstart.train import join, paragraphs, permutation, split


@dataclass(frozen=True)
class Example:
    """A prompt, empty where plain text is learnt, and its response."""

    prompt: str
    response: str


Parts = Mapping[Part, Sequence[Example]]


def read_parts(study: Study) -> Parts:
    """Read the data of a study.

    Raises:
        StudyError: It cannot be read, or leaves a part empty.
    """
    parts: dict[Part, Sequence[Example]] = {}
    data = study.data
    if isinstance(data, Text):
        passages = split(data.passage_characters, data.base, data.held_out, data.topics)
        parts = {part: [Example("", one) for one in passages[part]] for part in ("base", "fine_tuning", "held_out")}
    else:
        parts = _pairs(data)
    if isinstance(study.base, FreshBase) and study.base.text is not None:
        base = [Example("", passage) for file in study.base.text for passage in _passages(file)]
        parts = {"base": base, **{part: some for part, some in parts.items() if part != "base"}}
    for part, examples in parts.items():
        if not examples:
            more = "topics" if isinstance(data, Text) else "records"
            raise StudyError(f"each part of the text needs a passage, got none for {part!r}: take more {more}")
    return parts


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of examples and their order."""
    return digest([[one.prompt, one.response] for one in examples])


def describe(data: Data, part: Part) -> str:
    """What the part is, for the card of a model that is trained on it."""
    if isinstance(data, Text):
        return f"the {part.replace('_', '-')} part of `pydoc_data.topics`, which every CPython carries"
    if part == "base":
        return "files named in the configuration of the study"
    if isinstance(data, HubDataset):
        return f"split `{data.train_split}` of the data set `{data.id}`, loss on the responses"
    return "prompts and responses named in the configuration of the study, loss on the responses"


def _pairs(data: JsonLines | HubDataset) -> dict[Part, Sequence[Example]]:
    what = data.train if isinstance(data, JsonLines) else f"split {data.train_split} of {data.id}"

    def made(records: list[Record]) -> list[Example]:
        return [Example(fill(one, data.prompt), fill(one, data.response, empty=False)) for one in records]

    train, held_out, validation = (_shuffled(records, data.shuffle) for records in _records(data))
    examples, aside = made(chosen(train, data.skip, data.take, what)), made(held_out)
    if data.held_out_share is not None:
        aside = [one for one in examples if _position(one) >= 1 - data.held_out_share]
        examples = [one for one in examples if _position(one) < 1 - data.held_out_share]
    parts: dict[Part, Sequence[Example]] = {"fine_tuning": examples}
    if validation:
        some = chosen(validation, data.validation_skip, data.validation_take, "what is for validation")
        parts["validation"] = made(some)
    return {**parts, "held_out": chosen(aside, 0, data.held_out_take, "what is held out")}


def _records(data: JsonLines | HubDataset) -> tuple[list[Record], list[Record], list[Record]]:
    """The records of training, of what is held out and of validation; empty where not named."""
    if isinstance(data, HubDataset):
        splits = data.train_split, data.held_out_split, data.validation_split
        train, held_out, validation = ([] if split is None else read_hub(data, split) for split in splits)
    else:
        files = data.train, data.held_out, data.validation
        train, held_out, validation = ([] if file is None else list(read_json_lines(expand(file))) for file in files)
    return train, held_out, validation


def _shuffled(records: list[Record], seed: int | None) -> list[Record]:
    return records if seed is None else [records[index] for index in permutation(len(records), seed, 0)]


def _position(one: Example) -> float:
    # By content, as for the text that CPython carries: a copy of a sample goes where the sample goes.
    content = hashlib.sha256(f"{one.prompt}\0{one.response}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(content[:8], "big") / 2**64


def _passages(file: TextFile) -> list[str]:
    path = expand(file.path)
    if file.template is None:
        passages = join(paragraphs(read_text(path)), file.passage_characters)
        return chosen(passages, file.skip, file.take, file.path)
    template = file.template
    return [fill(one, template) for one in chosen(list(read_json_lines(path)), file.skip, file.take, file.path)]
