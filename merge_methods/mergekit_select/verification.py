"""Verifies that an output is, bit for bit, what its recipe says: derives every tensor again and compares."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get as get_method
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.options import MergeOptions
from mergekit.sparsify import SparsificationMethod

from mergekit_select.output import RECIPE, Output, Problem, open_output, read_json
from mergekit_select.replay import PlannedTensor, Replay, UnreadableError, read_recipe, relocated, replayed

# Elements compared at once: the mask and its copies stay below a few megabytes.
_CHUNK = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What decides tensor names and shapes; the rest of a config.json is often edited after a merge, and differs
# between versions of transformers.
_SHAPE_KEYS = (
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


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
        for planned in progress(replay.tensors):
            comparison.compare(planned.name, replay.merged(planned))
        comparison.finish()
        problems = (*found.problems, *_config_problems(found, replay), *comparison.problems)
    kind = determinism(config.merge_method)
    return Verification(
        output=found.folder,
        recipe=path,
        method=config.merge_method,
        determinism=kind,
        tensors=comparison.tensors,
        parameters=comparison.parameters,
        problems=problems,
        differences=tuple(comparison.differences),
        notes=_notes(config, kind, bool(comparison.differences)),
    )


def _notes(config: MergeConfiguration, kind: Determinism, differs: bool) -> tuple[str, ...]:
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
    source = config.tokenizer.source if config.tokenizer is not None else config.tokenizer_source
    if source == "union" and differs:
        notes.append(
            "tokenizer: union orders the vocabulary by Python's hash seed: rows of embeddings and lm_head may "
            "be in another order; verify with the merge's PYTHONHASHSEED"
        )
    return tuple(notes)


def _config_problems(output: Output, replay: Replay) -> Iterable[Problem]:
    base = replay.config.base_model
    path = output.folder / "config.json"
    # Without a base model, mergekit takes the config from an arbitrary model.
    if base is None or not path.exists():
        return
    expected = replay.out_config.to_dict()
    content = read_json(path)
    for key in _SHAPE_KEYS:
        if key in content and key in expected and content[key] != expected[key]:
            text = f"{key} must be {expected[key]!r}, as the recipe gives it, got {content[key]!r}"
            yield Problem("inconsistent", path.name, text)


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
