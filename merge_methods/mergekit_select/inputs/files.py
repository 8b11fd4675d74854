"""The files of a model's folder: JSON of bounded size, which weights are loaded first, and texts written whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.inputs.bounds import MOST_JSON_BYTES, read_file, require_inside, require_regular_files

RECIPE = "mergekit_config.yml"  # what mergekit calls the recipe that it leaves in the folder of a merge
WORKSPACE = ".merge"  # the folder in the output in which `mergekit-select merge` works

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

# A checkpoint's weights, whole, as a shard, or as a shard of a merge that has not ended (without -of-N).
WEIGHTS = re.compile(r"(?P<stem>model|pytorch_model)(-\d+(?P<of>-of-\d+)?)?\.(?P<suffix>safetensors|bin)")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Of several, the file that is loaded first.
MERGEKIT_LOADS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
TRANSFORMERS_LOADS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Names that some version of transformers, or peft, opens in a model's folder without being told to: their formats are
# many, so all files of these suffixes count.
_OPENED = re.compile(
    r"(.*\.(json|jinja|model|py|safetensors|bin|tiktoken|spm|bpe|vocab|codes|tokenizer|distcp)|"
    r"(vocab|merges|dict)\.txt|\.metadata)(\.\d+)?|tokenizer\.model.*",
    re.IGNORECASE,
)
_OPENED_FOLDERS = ("additional_chat_templates", "custom_generate")
RECORDS = ("merge_provenance.json", "merge_tensors.json")  # what mergekit-select writes for itself
# What leads out of a folder on some system, or is no text; Windows leaves `model.safetensors:Zone.Identifier`.
_UNPORTABLE = re.compile(r"^~|[:\\\ud800-\udfff]")
_LOCK = ".lock.json"  # how the name of a lock ends that lies beside its recipe


def hidden(path: str) -> bool:
    """Whether a file is no part of a model: its name, or a folder that it lies in, begins with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def names_in(folder: Path) -> list[str]:
    """Return the files of a folder, and of those in it whose files transformers opens."""
    inner = (path for name in _OPENED_FOLDERS for path in (folder / name).glob("**/*"))
    return sorted(str(path.relative_to(folder)) for path in (*folder.iterdir(), *inner) if not path.is_dir())


def companion_names(folder: Path) -> list[str]:
    """Return the files that transformers or peft may load, but for weights, their indexes and config.json."""
    return [name for name in names_in(folder) if _is_opened(name)]


def _is_opened(name: str) -> bool:
    if _is_weights(name) or name in RECORDS or name.endswith(_LOCK) or _UNPORTABLE.search(name):
        return False
    return name.partition("/")[0] in _OPENED_FOLDERS or bool(_OPENED.fullmatch(name))


def _is_weights(name: str) -> bool:
    return name in ("config.json", *INDEXES) or bool(WEIGHTS.fullmatch(name))


def is_of_model(name: str) -> bool:
    """Whether a file belongs to a model by its name: weights, indexes, config, and what may be loaded beside."""
    return _is_weights(name) or _is_opened(name)


def model_names(folder: Path) -> list[str]:
    """Return the files of a folder that belong to a model by their names."""
    return [name for name in names_in(folder) if is_of_model(name)]


def published_names(folder: Path) -> list[str]:
    """Return the files of a merge's folder that are published: all but hidden ones and those in other folders."""
    return [name for name in names_in(folder) if not hidden(name) and os.path.exists(folder / name)]


def input_names(folder: Path) -> list[str]:
    """Return the files of a model's folder that a merge may read, wherever an index says that they lie.

    Links that lead nowhere are none, and hidden files only where an index names them.
    """
    if not folder.is_dir():
        return []
    named: set[str] = set()
    for index in INDEXES:
        with suppress(UnreadableError):  # whoever reads it will say so
            named.update(read_weight_map(folder / index).values() if (folder / index).exists() else ())
    names = {*named, *(name for name in model_names(folder) if not hidden(name))}
    return sorted(name for name in names if os.path.exists(folder / name))


def first_loaded(order: Collection[str], names: Collection[str]) -> str | None:
    """Return the first of these names that a folder has, or None."""
    return next((name for name in order if name in names), None)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of at most ``MOST_JSON_BYTES``.

    Raises:
        UnreadableError: The file cannot be read, is larger, is no JSON, or holds something else.
    """
    try:
        # As transformers decodes it; from bytes, json would read a byte order mark and UTF-16 too.
        value = json.loads(read_file(path, MOST_JSON_BYTES).decode())
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} must be JSON, and is not: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UnreadableError(f"{path} must hold a JSON object, and holds {type(value).__name__}")
    return value


def state(path: str | os.PathLike[str]) -> list[int]:
    """Return what changes when a file does: its size, and its times of modification and of change.

    Copying tools restore the time of modification; nothing restores the time of change.

    Raises:
        UnreadableError: There is no such file.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UnreadableError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def require_readable(folder: Path) -> None:
    """Refuse a model's folder before mergekit and transformers open it: their own errors do not name the file.

    Raises:
        UnreadableError: Its config.json is missing, or a file is not what it should be; see ``bounds``.
    """
    require_regular_files(folder)
    read_json(folder / "config.json")
    for index in INDEXES:
        if (folder / index).exists():
            read_weight_map(folder / index)


def read_weight_map(path: Path) -> dict[str, str]:
    """Return an index's shard file name by tensor name.

    Raises:
        UnreadableError: As for ``read_json``, or the index has no such mapping, or names a file elsewhere.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UnreadableError(f"{path} must map tensor names to files under the key weight_map, and does not")
    for shard in sorted(set(weight_map.values())):
        require_inside(path.parent, shard, path)
    return weight_map


def write_whole(path: Path, text: str, durably: bool = False) -> None:
    """Write a text in UTF-8 in one step, line endings as they are: a reader never finds half of it.

    Args:
        path: The file.
        text: What it is to hold.
        durably: Whether that has to be so after a power cut, too.

    Raises:
        OSError: It cannot be written; what was there before stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            if durably:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durably:
            sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def forget(descriptor: int, start: int = 0, size: int = 0) -> None:
    """Let the system take the memory that holds these bytes of a file, all by default, which are on the disk too."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
