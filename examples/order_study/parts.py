"""The parts of the data on disk, as JSON lines, so that what is held out stays with the models."""

import hashlib
import json
from pathlib import Path

from order_study import text
from order_study.errors import StudyError
from order_study.example import Example, digest
from order_study.folders import FolderRecord, read_record, write_record, writing
from order_study.records import Record, chosen, example, expand, fill, read_hub, read_json_lines, read_text
from order_study.settings import PARTS, Data, FreshBase, Part, Study
from order_study.sources import HubDataset, JsonLines, Text, TextFile

RECORD = "text.json"

Parts = dict[Part, list[Example]]


class TextRecord(FolderRecord):
    """What the folder of the text holds."""

    data: Data
    base_text: tuple[TextFile, ...] | None
    sha256: dict[Part, str]


def ensure_parts(folder: Path, study: Study) -> Parts:
    """Read the data of a study and have its parts in `folder`, which is left alone if it holds the same."""
    base_text = study.base.text if isinstance(study.base, FreshBase) else None
    parts = _parts(study.data, base_text)
    for part, examples in parts.items():
        if not examples:
            raise StudyError(
                f"each part of the text needs a passage, got none for {part!r}: "
                + ("take more topics" if isinstance(study.data, Text) else "take more records")
            )
    wanted = TextRecord(
        data=study.data, base_text=base_text, sha256={part: digest(examples) for part, examples in parts.items()}
    )
    if read_record(folder, RECORD, TextRecord) == wanted and all(_file(folder, part).exists() for part in parts):
        return parts
    with writing(folder) as unfinished:
        for part, examples in parts.items():
            lines = [json.dumps(_line(one), ensure_ascii=False) + "\n" for one in examples]
            _file(unfinished, part).write_text("".join(lines), encoding="utf-8")
        write_record(unfinished, RECORD, wanted)
    return parts


def read_part(folder: Path, part: Part) -> list[Example]:
    """Read one part back.

    Raises:
        StudyError: The folder is not one that this program wrote.
    """
    path = _file(folder, part)
    try:
        with path.open(encoding="utf-8") as file:
            return [_example(json.loads(line)) for line in file]
    except OSError as error:
        raise StudyError(
            f"the {part} part is read from disk, but {path} cannot be read ({error.strerror}): "
            "train first, or name the folder with --text"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"each line of {path} must be a JSON object with a text, or with prompt and response, got {error!r}: "
            "delete the folder and train again"
        ) from error


def _parts(data: Data, base_text: tuple[TextFile, ...] | None) -> Parts:
    parts: Parts = {}
    if isinstance(data, Text):
        parts = {part: [Example("", one) for one in passages] for part, passages in text.split(data).items()}
    else:
        parts["fine_tuning"], parts["held_out"] = _pairs(data)
    if base_text is not None:
        parts["base"] = [Example("", passage) for file in base_text for passage in _passages(file)]
    return {part: parts[part] for part in PARTS if part in parts}


def _pairs(data: JsonLines | HubDataset) -> tuple[list[Example], list[Example]]:
    train, held_out = _records(data)
    what = data.train if isinstance(data, JsonLines) else f"split {data.train_split} of {data.id}"
    examples = [example(record, data.prompt, data.response) for record in chosen(train, data.skip, data.take, what)]
    if data.held_out_share is None:
        aside = [example(record, data.prompt, data.response) for record in held_out]
    else:
        aside = [one for one in examples if _position(one) >= 1 - data.held_out_share]
        examples = [one for one in examples if _position(one) < 1 - data.held_out_share]
    return examples, chosen(aside, 0, data.held_out_take, "what is held out")


def _records(data: JsonLines | HubDataset) -> tuple[list[Record], list[Record]]:
    if isinstance(data, HubDataset):
        held_out = [] if data.held_out_split is None else read_hub(data, data.held_out_split)
        return read_hub(data, data.train_split), held_out
    held_out = [] if data.held_out is None else list(read_json_lines(expand(data.held_out)))
    return list(read_json_lines(expand(data.train))), held_out


def _position(one: Example) -> float:
    # By content, as for the text that CPython carries: a copy of a sample goes where the sample goes.
    content = hashlib.sha256(f"{one.prompt}\0{one.response}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(content[:8], "big") / 2**64


def _passages(file: TextFile) -> list[str]:
    path = expand(file.path)
    if file.template is None:
        passages = text.join(text.paragraphs(read_text(path)), file.passage_characters)
        return chosen(passages, file.skip, file.take, file.path)
    records = chosen(list(read_json_lines(path)), file.skip, file.take, file.path)
    return [fill(record, file.template) for record in records]


def _line(one: Example) -> dict[str, str]:
    return {"prompt": one.prompt, "response": one.response} if one.prompt else {"text": one.response}


def _example(line: dict[str, str]) -> Example:
    return Example("", line["text"]) if "text" in line else Example(line["prompt"], line["response"])


def _file(folder: Path, part: Part) -> Path:
    return folder / f"{part}.jsonl"
