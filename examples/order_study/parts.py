"""The parts of the text on disk, as JSON lines, so that what is held out stays with the models."""

import json
from pathlib import Path

from order_study import text
from order_study.errors import StudyError
from order_study.folders import FolderRecord, read_record, write_record, writing
from order_study.settings import PARTS, Part, Text

RECORD = "text.json"


class TextRecord(FolderRecord):
    """What the folder of the text holds."""

    settings: Text
    sha256: dict[Part, str]


def ensure_parts(folder: Path, settings: Text) -> dict[Part, list[str]]:
    """Split the text and have its parts in `folder`, which is left alone if it holds the same."""
    parts = text.split(settings)
    for part in PARTS:
        if not parts[part]:
            raise StudyError(f"each part of the text needs a passage, got none for {part!r}: take more topics")
    wanted = TextRecord(settings=settings, sha256={part: text.digest(parts[part]) for part in PARTS})
    if read_record(folder, RECORD, TextRecord) == wanted and all(_file(folder, part).exists() for part in PARTS):
        return parts
    with writing(folder) as unfinished:
        for part in PARTS:
            lines = [json.dumps({"text": passage}, ensure_ascii=False) + "\n" for passage in parts[part]]
            _file(unfinished, part).write_text("".join(lines), encoding="utf-8")
        write_record(unfinished, RECORD, wanted)
    return parts


def read_part(folder: Path, part: Part) -> list[str]:
    """Read one part back.

    Raises:
        StudyError: The folder is not one that this program wrote.
    """
    path = _file(folder, part)
    try:
        with path.open(encoding="utf-8") as file:
            passages: list[str] = [json.loads(line)["text"] for line in file]
    except OSError as error:
        raise StudyError(
            f"the {part} part is read from disk, but {path} cannot be read ({error.strerror}): "
            "train first, or name the folder with --text"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"each line of {path} must be a JSON object with a text, got {error!r}: delete the folder and train again"
        ) from error
    return passages


def _file(folder: Path, part: Part) -> Path:
    return folder / f"{part}.jsonl"
