"""Verifies that an output is, bit for bit, what its recipe says: derives every tensor again and compares."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.merge import _model_out_config, _update_config_vocab
from mergekit.merge_methods import get as get_method
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.options import MergeOptions
from mergekit.sparsify import SparsificationMethod
from transformers import PretrainedConfig

from mergekit_select.output import RECIPE, Output, Problem, open_output, read_json
from mergekit_select.replay import PlannedTensor, Replay, UnreadableError, one_line, read_recipe, relocated, replayed

# Elements compared at once: the mask and its copies stay below a few megabytes.
_CHUNK = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Keys of a config.json, at any depth, that may differ between a merge and its replay: where the model lay and lies,
# in what it is stored (compared in the tensors), how it is run, and what wrote it.
_IGNORED_KEYS = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "auto_map",  # names the repository, of a model that was on a hub
        "custom_pipelines",  # the same
        "dtype",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
        "use_cache",
    }
)
_ABSENT = object()


class Determinism(Enum):
    """Whether a method gives the same bits again."""

    EXACT = "exact"
    ARITHMETIC = "arithmetic"
    RANDOM = "random"
    UNKNOWN = "unknown"


_EXACT = frozenset({"parameter_selection", "parameter_selection_resampling", "passthrough"})
_ARITHMETIC = frozenset(
    {
        "breadcrumbs",
        "breadcrumbs_ties",
        "karcher",
        "linear",
        "model_stock",
        "multislerp",
        "nearswap",
        "nuslerp",
        "ram",
        "ramplus_tl",
        "sce",
        "slerp",
        "task_arithmetic",
        "ties",
    }
)
# arcee_fusion samples its quantiles from tensors of more than a million elements.
_RANDOM = frozenset({"dare_ties", "dare_linear", "della", "della_linear", "arcee_fusion"})
_RANDOM_MASKS = (SparsificationMethod.random, SparsificationMethod.della_magprune)


def determinism(method_name: str) -> Determinism:
    """Tell what is known of a merge method by name; a third-party method is unknown."""
    if method_name in _EXACT:
        return Determinism.EXACT
    if method_name in _RANDOM:
        return Determinism.RANDOM
    if method_name in _ARITHMETIC:
        return Determinism.ARITHMETIC
    try:
        method = get_method(method_name)
    except RuntimeError:
        return Determinism.UNKNOWN
    if isinstance(method, GeneralizedTaskArithmeticMerge) and method.sparsification_method in _RANDOM_MASKS:
        return Determinism.RANDOM
    return Determinism.UNKNOWN


@dataclass(frozen=True)
class Difference:
    """One tensor that is not what the recipe says.

    Attributes:
        tensor: Its name.
        kind: ``missing``, ``extra``, ``renamed``, ``dtype``, ``shape`` or ``bits``.
        expected: What the recipe gives; of ``bits``, the first element that differs.
        found: What the output holds; of ``renamed``, the other name.
        count: Elements that differ; None except for ``bits``.
        elements: Elements of the tensor.
        index: Where the first of them is; None except for ``bits``.
    """

    tensor: str
    kind: str
    expected: str | None
    found: str | None
    count: int | None = None
    elements: int | None = None
    index: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Verification:
    """The answer.

    Attributes:
        output: The folder.
        recipe: The file that the tensors were derived from; None if there is none.
        method: The recipe's method.
        determinism: Whether that method gives the same bits again.
        tensors: How many tensors were compared.
        parameters: How many elements these have.
        problems: Why the output is unfinished, or disagrees with itself.
        differences: The tensors that are not what the recipe says.
        notes: What else the reader should know.
        undecided: Whether all that differs are bits that may differ between two runs of the same recipe.
    """

    output: Path
    recipe: Path | None
    method: str | None
    determinism: Determinism | None
    tensors: int
    parameters: int
    problems: tuple[Problem, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    undecided: bool = False

    @property
    def same(self) -> bool:
        """Whether the output is finished and every bit is what the recipe says."""
        return not self.problems and not self.differences


Progress = Callable[[Iterable[PlannedTensor]], Iterable[PlannedTensor]]


def verify(
    output: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | None = None,
    *,
    locations: Mapping[str, str] | None = None,
    options: MergeOptions | None = None,
    progress: Progress = lambda tensors: tensors,
) -> Verification:
    """Derive every tensor of an output again from its recipe, and compare bits, names, shapes and dtypes.

    One tensor and its inputs are in memory at a time. Nothing is written, except what mergekit itself
    downloads and caches.

    Args:
        output: The folder that a merge was written to.
        recipe: Instead of the ``mergekit_config.yml`` in that folder.
        locations: Where models of the recipe lie now; see ``replay.relocated``.
        options: As for the merge.
        progress: Wraps the tensors as they are gone through.

    Raises:
        UnreadableError: The output, the recipe or a model cannot be read.
        ReplayError: mergekit refuses the merge.
        MergekitSelectError: A parameter breaks its rule.
    """
    found = open_output(output)
    path = Path(recipe) if recipe is not None else found.folder / RECIPE
    if recipe is None and not path.exists():
        text = (
            "missing: the merge has not ended, or was run with --no-write-model-card; "
            "merge again, or give the recipe with --recipe"
        )
        problems = (*found.problems, Problem("unfinished", RECIPE, text))
        return Verification(found.folder, None, None, None, 0, 0, problems, (), ())
    config = read_recipe(path)
    if locations:
        config = relocated(config, locations)
    with replayed(config, options) as replay:
        comparison = _Comparison(found)
        vocabulary = set()
        for planned in progress(replay.tensors):
            if planned.weight.vocabulary_axis is not None:
                vocabulary.add(planned.name)
            comparison.compare(planned.name, replay.merged(planned))
        comparison.finish()
        problems = (*found.problems, *_config_problems(found, replay, options or MergeOptions()), *comparison.problems)
    kind = determinism(config.merge_method)
    differing = {difference.tensor for difference in comparison.differences}
    reordered = _tokenizer_source(config) == "union" and not differing.isdisjoint(vocabulary)
    undecided = (
        bool(differing)
        and not problems
        and all(difference.kind == "bits" for difference in comparison.differences)
        and (kind is Determinism.RANDOM or (reordered and differing <= vocabulary))
    )
    return Verification(
        output=found.folder,
        recipe=path,
        method=config.merge_method,
        determinism=kind,
        tensors=comparison.tensors,
        parameters=comparison.parameters,
        problems=problems,
        differences=tuple(comparison.differences),
        notes=_notes(config, kind, bool(differing), reordered),
        undecided=undecided,
    )


def _tokenizer_source(config: MergeConfiguration) -> object:
    return config.tokenizer.source if config.tokenizer is not None else config.tokenizer_source


def _notes(config: MergeConfiguration, kind: Determinism, differs: bool, reordered: bool) -> tuple[str, ...]:
    notes = []
    name = config.merge_method
    if kind is Determinism.RANDOM:
        notes.append(f"{name} draws at random anew in every run: bits that differ do not tell another recipe")
    if kind is Determinism.UNKNOWN:
        notes.append(f"{name} is not known here: whether it gives the same bits again cannot be told")
    if kind is Determinism.ARITHMETIC and differs:
        notes.append(
            f"{name} computes in floating point: another device, number of threads or version of torch may "
            f"round otherwise; verify with those of the merge"
        )
    if reordered:
        notes.append(
            "tokenizer: union orders the vocabulary anew in every run: rows of embeddings and lm_head may be in "
            "another order, and that they differ does not tell another recipe; an output that can be verified needs "
            "one model, or base, as the tokenizer's source"
        )
    return tuple(notes)


def _config_problems(output: Output, replay: Replay, options: MergeOptions) -> list[Problem]:
    """Compare config.json with the config that the recipe gives; without a base model, with the nearest of these."""
    path = output.folder / "config.json"
    if not path.exists():
        return []
    content = dict(read_json(path))
    found = [_compare_config(path.name, content, expected) for expected in _expected_configs(replay, options)]
    return min(found, key=len)


def _expected_configs(replay: Replay, options: MergeOptions) -> Iterable[PretrainedConfig]:
    """Return the config that mergekit would write; without a base model, those of which it takes an arbitrary one."""
    recipe = replay.config
    architecture = get_architecture_info(recipe.model_copy(deep=True), options)
    if recipe.base_model is not None:
        configs = [copy.deepcopy(replay.out_config)]
    else:
        changes = {"dtype": None, "out_dtype": None}
        configs = [
            _model_out_config(
                recipe.model_copy(update={**changes, "base_model": model}, deep=True),
                architecture,
                options.trust_remote_code,
            )
            for model in sorted(recipe.referenced_models(), key=str)
        ]
    for info in replay.tokenizers.values():
        padding = None if recipe.tokenizer is None else recipe.tokenizer.pad_to_multiple_of
        for config in configs:
            _update_config_vocab(config, architecture, info.tokenizer, pad_to_multiple_of=padding)
    return configs


def _compare_config(file: str, content: dict[str, Any], expected: PretrainedConfig) -> list[Problem]:
    # As save_pretrained writes it.
    written: dict[str, Any] = json.loads(expected.to_json_string())
    differences: Iterable[tuple[str, object, object]]
    if content.get("transformers_version") == written["transformers_version"]:
        # What has its default need not be written.
        defaults = json.loads(expected.to_json_string(use_diff=False))
        differences = _compare_objects(written, content, defaults)
    else:
        # Versions of transformers write other keys for the same: what both know of is compared as this one reads it.
        try:
            read = json.loads(type(expected).from_dict(content).to_json_string(use_diff=False))
        except Exception as error:  # each config class checks what it likes
            return [Problem("inconsistent", file, f"transformers cannot read it: {one_line(error)}")]
        full = json.loads(expected.to_json_string(use_diff=False))
        read["model_type"] = content.get("model_type", _ABSENT)  # that of the class, whatever the file says
        differences = _compare_objects(full, read, None)
    return [Problem("inconsistent", file, _config_text(*difference)) for difference in differences]


def _compare_objects(
    expected: dict[str, Any], found: dict[str, Any], defaults: dict[str, Any] | None, place: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Compare two JSON objects, key by key.

    Args:
        expected: One.
        found: The other.
        defaults: Values that only ``found`` may give; None to compare the keys that both have.
        place: What precedes the keys.

    Yields:
        Key, with those above it, and the two values.
    """
    for key in sorted((expected.keys() | found.keys()) - _IGNORED_KEYS):
        left, right = expected.get(key, _ABSENT), found.get(key, _ABSENT)
        if isinstance(left, dict) and isinstance(right, dict):
            below = None if defaults is None else defaults.get(key)
            if defaults is not None and not isinstance(below, dict):
                below = {}
            yield from _compare_objects(left, right, below, f"{place}{key}.")
            continue
        if key not in expected or key not in found:
            if defaults is None:
                continue
            if key in found and defaults.get(key, _ABSENT) == right:
                continue
        if left != right:
            yield f"{place}{key}", left, right


def _config_text(key: str, expected: object, found: object) -> str:
    if expected is _ABSENT:
        return f"{key} must not be set, as the recipe gives none, got {found!r}"
    got = "it is missing" if found is _ABSENT else f"got {found!r}"
    return f"{key} must be {expected!r}, as the recipe gives it, {got}"


class _Comparison:
    """Collects what is found while the tensors go by."""

    def __init__(self, output: Output):
        self.output = output
        self.tensors = 0
        self.parameters = 0
        self.differences: list[Difference] = []
        self.problems: list[Problem] = []
        self._bytes = 0
        self._seen: set[str] = set()
        self._missing: list[tuple[str, str, bytes]] = []

    def compare(self, name: str, expected: torch.Tensor | None) -> None:
        """Compare one tensor of the output with the recipe's; None for one that the merge skips."""
        if expected is None:
            return
        if name not in self.output.files:
            self._missing.append((name, _describe(expected), _digest(expected)))
            return
        self._seen.add(name)
        found = self.output.read(name)
        self.tensors += 1
        self.parameters += found.numel()
        self._bytes += found.nbytes
        difference = _difference(name, expected, found)
        if difference is not None:
            self.differences.append(difference)

    def finish(self) -> None:
        """Compare what is left: tensors that only one side has."""
        extra = {}
        for name in sorted(self.output.files.keys() - self._seen):
            found = self.output.read(name)
            self._bytes += found.nbytes
            extra[name] = (_describe(found), _digest(found) if self._missing else b"")
        for name, expected, digest in self._missing:
            twin = next((other for other, (_, its) in extra.items() if its == digest), None)
            if twin is None:
                self.differences.append(Difference(name, "missing", expected, None))
            else:
                del extra[twin]
                self.differences.append(Difference(name, "renamed", name, twin))
        for name, (description, _) in extra.items():
            self.differences.append(Difference(name, "extra", None, description))
        size = self.output.total_size
        complete = not any(problem.kind == "unfinished" for problem in self.output.problems)
        if self.output.index is not None and complete and size is not None and size != self._bytes:
            text = f"metadata.total_size must be the {self._bytes} bytes of the tensors, got {size!r}"
            self.problems.append(Problem("inconsistent", self.output.index, text))


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bits as a flat tensor of integers."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    integer = _INTEGERS.get(flat.element_size())
    if integer is None:  # complex128: two integers an element
        return flat.view(torch.uint8)
    return flat.view(integer)


def _digest(tensor: torch.Tensor) -> bytes:
    digest = hashlib.blake2b(_describe(tensor).encode())
    bits = _bits(tensor).view(torch.uint8)
    for start in range(0, len(bits), _CHUNK):
        digest.update(bits[start : start + _CHUNK].numpy().data)
    return digest.digest()


def _difference(name: str, expected: torch.Tensor, found: torch.Tensor) -> Difference | None:
    if expected.dtype != found.dtype:
        return Difference(name, "dtype", _describe(expected), _describe(found), elements=found.numel())
    if expected.shape != found.shape:
        return Difference(name, "shape", _describe(expected), _describe(found), elements=found.numel())
    left, right = _bits(expected), _bits(found)
    count, first = 0, -1
    for start in range(0, len(left), _CHUNK):
        a, b = left[start : start + _CHUNK], right[start : start + _CHUNK]
        if torch.equal(a, b):
            continue
        differing = torch.ne(a, b)
        if first < 0:
            first = start + int(differing.to(torch.uint8).argmax())
        count += int(torch.count_nonzero(differing))
    if not count:
        return None
    return Difference(
        tensor=name,
        kind="bits",
        expected=_element(expected, left, first),
        found=_element(found, right, first),
        count=count,
        elements=expected.numel(),
        index=_unravel(first, expected.shape),
    )


def _element(tensor: torch.Tensor, bits: torch.Tensor, position: int) -> str:
    """Return one element as its value and its bits: two values that look alike may differ in these."""
    width = bits.element_size() * 8
    value = tensor.detach().to("cpu").reshape(-1)[position]
    shown = f"{value.double().item():.9g}" if value.is_floating_point() else str(value.item())
    return f"{shown} (0x{int(bits[position]) % (1 << width):0{width // 4}x})"


def _unravel(position: int, shape: Iterable[int]) -> tuple[int, ...]:
    result = []
    for size in reversed(tuple(shape)):
        result.append(position % size)
        position //= size
    return tuple(reversed(result))


__all__ = ["Determinism", "Difference", "UnreadableError", "Verification", "determinism", "verify"]
