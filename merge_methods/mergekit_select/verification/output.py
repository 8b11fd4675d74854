"""What a merge left in its folder: which files, whether they agree, and the tensors, read one at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from mergekit_select import kinds
from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.findings import Finding, Findings, finding
from mergekit_select.inputs.bounds import require_regular_files
from mergekit_select.inputs.checkpoint import read_header
from mergekit_select.inputs.files import (
    INDEXES,
    RECIPE,
    TRANSFORMERS_LOADS,
    WEIGHTS,
    WORKSPACE,
    first_loaded,
    read_json,
    read_weight_map,
)


@dataclass(frozen=True)
class Output:
    """The weights of a folder, as transformers would load them.

    Attributes:
        folder: The folder.
        files: Tensor name to file name.
        index: Name of the index, if the weights are sharded.
        total_size: Bytes of all tensors, as the index states them.
        problems: What keeps this from being a finished output.
    """

    folder: Path
    files: Mapping[str, str]
    index: str | None
    total_size: object
    problems: tuple[Finding, ...]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            UnreadableError: The file is damaged, or has gone.
        """
        path = self.folder / self.files[name]
        with _reading(path):
            if path.suffix == ".bin":
                tensor: torch.Tensor = _load_pickled(path)[name]
                if tensor.layout is not torch.strided:
                    raise UnreadableError(f"{path} must hold dense tensors, and {name!r} is {tensor.layout}")
                return tensor.resolve_conj().resolve_neg()
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
    require_regular_files(root)
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    indexes = [name for name in INDEXES if name in names]
    if not weights and not indexes and RECIPE not in names and "config.json" not in names:
        if (root / WORKSPACE / "plan.json").exists():
            return Output(root, {}, None, None, (finding(kinds.MERGE_UNFINISHED, WORKSPACE),))
        raise UnreadableError(f"{root} holds nothing that a merge writes; give the folder that mergekit-yaml wrote")
    problems = Findings()
    if "config.json" in names:
        read_json(root / "config.json")
    else:
        problems.add(kinds.CONFIG_MISSING, "config.json")
    loaded = first_loaded(TRANSFORMERS_LOADS, names)
    index = loaded if loaded in INDEXES else None
    weight_map = None if index is None else read_weight_map(root / index)
    used = _used(loaded, weight_map, weights, problems)
    _unused(used, loaded, weights, indexes, problems)
    files: dict[str, str] = {}
    for name in used:
        for tensor in _names_in(root / name, problems):
            if tensor in files:
                text = f"holds {tensor!r}, as {files[tensor]} does"
                problems.add(kinds.FILES_DISAGREE, name, problem=text)
            files[tensor] = name
    total_size = None
    if index is None or weight_map is None or not used:
        return Output(root, files, None, None, tuple(problems))
    metadata = read_json(root / index).get("metadata")
    if isinstance(metadata, dict):
        total_size = metadata.get("total_size")
    else:
        text = f"metadata must be an object, or transformers cannot read it, got {metadata!r}"
        problems.add(kinds.FILES_DISAGREE, index, problem=text)
    for problem in _index_problems(root, weight_map, files):
        problems.add(kinds.FILES_DISAGREE, index, problem=problem)
    return Output(root, files, index, total_size, tuple(problems))


def _used(
    loaded: str | None, weight_map: Mapping[str, str] | None, weights: Sequence[str], problems: Findings
) -> list[str]:
    """Return the weight files that transformers would load; of a set of shards, also one that the index forgets."""
    if loaded is None:
        if weights:
            stem = "pytorch_model.bin" if weights[0].endswith(".bin") else "model.safetensors"
            problems.add(kinds.INDEX_MISSING, f"{stem}.index.json")
        else:
            problems.add(kinds.WEIGHTS_MISSING, "model.safetensors")
        return [*weights]
    if weight_map is None:
        return [loaded]
    named = sorted(set(weight_map.values()))
    own = _same_set([*weight_map.values()], weights)
    for name in sorted(own - set(named)):
        problems.add(kinds.SHARD_FORGOTTEN, name, index=loaded)
    for name in named:
        if name not in weights:
            problems.add(kinds.SHARD_MISSING, name, index=loaded)
    return sorted({name for name in named if name in weights} | own)


def _unused(
    used: Sequence[str], loaded: str | None, weights: Sequence[str], indexes: Sequence[str], problems: Findings
) -> None:
    if loaded is None:
        return
    for name in [*weights, *indexes]:
        if name in used or name == loaded:
            continue
        match = WEIGHTS.fullmatch(name)
        if match is not None and "-" in name and match["of"] is None:
            problems.add(kinds.SHARD_TEMPORARY, name)
        elif used:
            problems.add(kinds.WEIGHTS_STALE, name, loaded=used[0])
        else:
            problems.add(kinds.WEIGHTS_NOT_NAMED, name, index=loaded)


def _same_set(named: Sequence[str], weights: Collection[str]) -> set[str]:
    """Return the files of the set of shards, ``-of-N``, that most entries of an index name, or that is the only one."""
    sets = Counter(part for name in named if (part := _set_of(name)) is not None)
    if not sets:
        sets = Counter({part for name in weights if (part := _set_of(name)) is not None})
        if len(sets) != 1:
            return set()
    ((most, _),) = sets.most_common(1)
    return {name for name in weights if _set_of(name) == most}


def _set_of(name: str) -> tuple[str, str, str] | None:
    match = WEIGHTS.fullmatch(name)
    return None if match is None or match["of"] is None else (match["stem"], match["of"], match["suffix"])


def _names_in(path: Path, problems: Findings) -> list[str]:
    if path.suffix == ".bin":
        with _reading(path):
            return sorted(_load_pickled(path))
    tensors, metadata = read_header(path)
    if metadata != {"format": "pt"}:
        text = f"its metadata must be {{'format': 'pt'}}, as mergekit writes it, got {metadata!r}"
        problems.add(kinds.FILES_DISAGREE, path.name, problem=text)
    return sorted(tensors)


def _index_problems(root: Path, weight_map: Mapping[str, str], files: Mapping[str, str]) -> Iterator[str]:
    for name, file in sorted(weight_map.items()):
        if files.get(name) != file and (root / file).exists():
            place = f"which is in {files[name]}" if name in files else "which it does not hold"
            yield f"says that {file} holds {name!r}, {place}"
    for name in sorted(files.keys() - weight_map.keys()):
        yield f"does not name {name!r}, which {files[name]} holds"


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
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
