"""A LoRA adapter in a local folder: whether its files are there, and whether its matrices fit a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_select import kinds
from mergekit_select.errors import UnreadableError
from mergekit_select.findings import UnusableModelError
from mergekit_select.inputs.bounds import require_regular_files
from mergekit_select.inputs.checkpoint import Checkpoint, StoredTensor, read_shard
from mergekit_select.inputs.files import read_json

_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings of peft's under which the matrices have other shapes, or belong to other modules.
_OTHER_SHAPES = ("use_qalora", "use_bdlora", "layer_replication", "target_parameters", "megatron_config")
_DEFAULT_RANK = 8  # peft's


@dataclass(frozen=True)
class Adapter:
    """One adapter's description.

    Attributes:
        config: Its adapter_config.json.
        tensors: By name.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Fit:
    """Whether peft could merge an adapter into a model, as far as config and shapes tell.

    Attributes:
        problems: Key, what is wrong with it, and its value.
        kind_known: Whether this kind of adapter is understood at all.
        unknown: Tensors of which it is not known.
    """

    problems: tuple[tuple[str, str, str], ...] = ()
    kind_known: bool = True
    unknown: tuple[str, ...] = ()


def read_adapter(folder: Path) -> Adapter:
    """Describe the adapter in a local folder.

    Raises:
        UnusableModelError: It has no config or weights, or they are not what they should be.
    """
    if not (folder / "adapter_config.json").exists():
        raise UnusableModelError(kinds.ADAPTER_WITHOUT_CONFIG, adapter=folder)
    try:
        require_regular_files(folder)
        config = read_json(folder / "adapter_config.json")
        weights = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
        stored = next((file for file in weights if file.exists()), None)
        if stored is None:
            raise UnusableModelError(kinds.ADAPTER_WITHOUT_WEIGHTS, adapter=folder)
        return Adapter(config, read_shard(stored))
    except UnusableModelError:
        raise
    except UnreadableError as error:
        raise UnusableModelError(kinds.ADAPTER_UNREADABLE, problem=str(error)) from error


def fit(adapter: Adapter, base: Checkpoint) -> Fit:
    """Compare an adapter with the model that it is to be merged into."""
    config = adapter.config
    kind, rank = config.get("peft_type"), config.get("r", _DEFAULT_RANK)
    if not isinstance(kind, str):
        return Fit((("peft_type", "adapter_config.json must name a peft_type", repr(kind)),))
    if kind == "LORA" and (type(rank) is not int or rank <= 0):
        return Fit((("r", "the rank r in adapter_config.json must be a positive whole number", repr(rank)),))
    if kind != "LORA" or any(config.get(key) for key in _OTHER_SHAPES) or base.tensors is None:
        return Fit(kind_known=False)
    problems, unknown = [], []
    for key, tensor in adapter.tensors.items():
        problem = _matrix_problem(key, tensor, config, base.tensors)
        if problem is None:
            unknown.append(key)
        elif problem:
            problems.append((key, problem, str(list(tensor.shape))))
    return Fit(tuple(problems), unknown=tuple(unknown) if adapter.tensors else ("",))


def newest_change(folder: Path) -> float:
    """Return when the newest file of a folder was written, in seconds since the epoch."""
    return max((file.stat().st_mtime for file in folder.iterdir()), default=0.0)


def _matrix_problem(
    key: str, tensor: StoredTensor, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> str | None:
    """Say why a LoRA matrix does not fit the model; empty if it does, None where that is not known."""
    match = _MATRIX.fullmatch(key)
    weight = stored.get(f"{match['module']}.weight") if match else None
    targets = config.get("target_modules")
    if match is None or weight is None or len(weight.shape) != 2 or len(tensor.shape) != 2:
        return None
    module, side = match["module"], match["side"]
    listed = isinstance(targets, list) and any(module == end or module.endswith(f".{end}") for end in targets)
    try:
        rank = _rank(module, config)
    except re.error:
        return None
    if listed and tensor.shape[0 if side == "A" else 1] != rank:
        return f"lora_{side} must have the rank that adapter_config.json gives its module, which is {rank}"
    length = tensor.shape[1 if side == "A" else 0]
    expected, swapped = (weight.shape[1], weight.shape[0]) if side == "A" else weight.shape
    if length == expected:
        return ""
    if length == swapped:  # some models store weights transposed, with or without fan_in_fan_out
        return "" if config.get("fan_in_fan_out") else None
    return f"lora_{side} must fit the model's {module}.weight of shape {list(weight.shape)}" if listed else None


def _rank(module: str, config: Mapping[str, Any]) -> object:
    """Return the rank that peft gives a module: the first pattern that ends its name, else r."""
    patterns = config.get("rank_pattern")
    for pattern, rank in (patterns if isinstance(patterns, dict) else {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return rank
    return config.get("r", _DEFAULT_RANK)
