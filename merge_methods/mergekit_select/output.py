"""What a merge left in its folder: which files, whether they agree, and the tensors, read one at a time."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from mergekit_select.replay import UnreadableError, one_line, safetensors_names

RECIPE = "mergekit_config.yml"

_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+(-of-\d+)?)?\.(safetensors|bin)")
_SHARD = re.compile(r"(model|pytorch_model)-\d+(-of-\d+)\.(safetensors|bin)")
_TEMPORARY = re.compile(r"(model|pytorch_model)-\d+\.(safetensors|bin)")


@dataclass(frozen=True)
class Problem:
    """Why a folder is not a finished output.

    Attributes:
        kind: ``unfinished``, ``stale`` or ``inconsistent``.
        place: File, relative to the folder.
        text: What is wrong, and the remedy.
    """

    kind: str
    place: str
    text: str


@dataclass(frozen=True)
class Output:
    """The weights of a folder, as transformers would load them.

    Attributes:
        folder: The folder.
        files: Tensor name to file name.
        index: Name of the index, if the weights are sharded.
        total_size: Bytes of all tensors, as the index tells them.
        problems: What keeps this from being a finished output.
    """

    folder: Path
    files: Mapping[str, str]
    index: str | None
    total_size: object
    problems: tuple[Problem, ...]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            UnreadableError: The file is damaged, or has gone.
        """
        path = self.folder / self.files[name]
        with _reading(path):
            if path.suffix == ".bin":
                tensor: torch.Tensor = _load_pickled(path)[name]
                return tensor
            with safetensors.safe_open(str(path), framework="pt") as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]


def open_output(folder: str | os.PathLike[str]) -> Output:
    """Look at a folder that a merge was written to.

    Raises:
        UnreadableError: There is no such folder, it holds nothing of a merge, or a file is damaged.
    """
    root = Path(folder)
    try:
        names = sorted(entry.name for entry in root.iterdir() if not entry.is_dir())
    except OSError as error:
        raise UnreadableError(f"cannot read the output folder {root}: {error.strerror}") from error
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    indexes = [name for name in names if name in ("model.safetensors.index.json", "pytorch_model.bin.index.json")]
    if not weights and not indexes and RECIPE not in names and "config.json" not in names:
        raise UnreadableError(f"{root} holds nothing that a merge writes; give the folder that mergekit-yaml wrote")
    problems = []
    if "config.json" not in names:
        problems.append(Problem("unfinished", "config.json", "missing: mergekit writes it after all tensors"))
    else:
        read_json(root / "config.json")
    used, found = _used(root, weights, indexes)
    problems += found
    files: dict[str, str] = {}
    for name in used:
        for tensor in _names_in(root / name, problems):
            if tensor in files:
                problems.append(Problem("inconsistent", name, f"holds {tensor!r}, as {files[tensor]} does"))
            files[tensor] = name
    index, total_size = None, None
    if indexes and used and "model.safetensors" not in used and "pytorch_model.bin" not in used:
        index = indexes[0]
        content = read_json(root / index)
        metadata = content.get("metadata")
        total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
        problems += _compare_index(root, index, content["weight_map"], files)
    return Output(root, files, index, total_size, tuple(problems))


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UnreadableError: It is missing, or no such file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UnreadableError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _used(root: Path, weights: list[str], indexes: list[str]) -> tuple[list[str], list[Problem]]:
    """Return the weight files that transformers would load, and what is wrong with the others."""
    problems: list[Problem] = []
    if not weights and not indexes:
        return [], [Problem("unfinished", "model.safetensors", "no weights are there: the merge has not ended")]
    used: list[str]
    whole = next((name for name in ("model.safetensors", "pytorch_model.bin") if name in weights), None)
    index = indexes[0] if indexes else None
    if whole is not None and (whole == "model.safetensors" or index is None or not index.startswith("model.")):
        used = [whole]
    elif index is not None:
        weight_map = read_json(root / index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UnreadableError(f"{root / index} must map tensor names to files under the key weight_map")
        named = sorted(set(weight_map.values()))
        own = _shards(list(weight_map.values()), weights)
        # A shard of the same set that the index forgets is a part of this output too.
        used = sorted({name for name in named if name in weights} | own)
        for name in sorted(own - set(named)):
            text = (
                f"{index} names no tensor of this shard, which is of the same merge; restore the index, or merge again"
            )
            problems.append(Problem("inconsistent", name, text))
        for name in named:
            if name not in weights:
                problems.append(Problem("unfinished", name, f"missing: {index} names this shard; merge again"))
    else:
        used = weights
        problems.append(
            Problem(
                "unfinished",
                f"{_stem(weights[0])}.index.json",
                "missing: mergekit writes it after all shards",
            )
        )
        return used, problems
    for name in [*weights, *indexes]:
        if name in used or (name == index and whole not in used):
            continue
        if _TEMPORARY.fullmatch(name):
            text = "left by a merge that was interrupted; merge again into an empty folder"
            problems.append(Problem("unfinished", name, text))
        else:
            text = f"{index} does not name it; merge again into an empty folder"
            if used:
                text = f"of another merge into this folder; transformers loads {used[0]}; delete the older"
            problems.append(Problem("stale", name, text))
    return used, problems


def _shards(named: list[str], weights: list[str]) -> set[str]:
    """Return the files of the set of shards, ``-of-N``, that most entries of an index name, or that is the only one."""
    sets = Counter(_set_of(name) for name in named if _set_of(name) is not None)
    if not sets:
        sets = Counter({_set_of(name) for name in weights} - {None})
        if len(sets) != 1:
            return set()
    ((most, _),) = sets.most_common(1)
    return {name for name in weights if _set_of(name) == most}


def _set_of(name: str) -> tuple[str, ...] | None:
    match = _SHARD.fullmatch(name)
    return None if match is None else match.groups()


def _stem(name: str) -> str:
    return "pytorch_model.bin" if name.endswith(".bin") else "model.safetensors"


def _names_in(path: Path, problems: list[Problem]) -> list[str]:
    if path.suffix == ".bin":
        with _reading(path):
            return sorted(_load_pickled(path))
    names = sorted(safetensors_names(str(path)))
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    if metadata != {"format": "pt"}:
        text = f"its metadata must be {{'format': 'pt'}}, as mergekit writes it, got {metadata!r}"
        problems.append(Problem("inconsistent", path.name, text))
    return names


def _compare_index(
    root: Path, index: str, weight_map: Mapping[str, str], files: Mapping[str, str]
) -> Iterator[Problem]:
    for name, file in sorted(weight_map.items()):
        if files.get(name) != file and (root / file).exists():
            place = f"which is in {files[name]}" if name in files else "which it does not hold"
            yield Problem("inconsistent", index, f"says that {file} holds {name!r}, {place}")
    for name in sorted(files.keys() - weight_map.keys()):
        yield Problem("inconsistent", index, f"does not name {name!r}, which {files[name]} holds")


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict):
        raise UnreadableError(f"{path} must hold a dictionary of tensors, it holds a {type(content).__name__}")
    return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnreadableError:
        raise
    except Exception as error:  # safetensors, zip and pickle each have errors of their own
        raise UnreadableError(f"cannot read {path}: {one_line(error)}") from error
