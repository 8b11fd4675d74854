"""Compare an output's config.json with the one that its recipe gives."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mergekit_select import kinds
from mergekit_select.errors import one_line
from mergekit_select.findings import Findings
from mergekit_select.inputs.files import read_json

# Keys of a config.json, at any depth, that may differ between a merge and its replay: where the model lay and lies,
# how it is run, and what wrote it. None of them decides what is loaded.
_IGNORED_KEYS = frozenset(
    {"_attn_implementation_autoset", "_commit_hash", "_name_or_path", "transformers_version", "use_cache"}
)
# Keys that transformers obeys when it loads any model: whatever its version, one that the recipe does not give counts.
_OBEYED_KEYS = frozenset(
    {
        "_attn_implementation",
        "_experts_implementation",
        "attn_implementation",
        "auto_map",
        "base_model_tp_plan",
        "compression_config",
        "configuration_files",
        "custom_pipelines",
        "experts_implementation",
        "fusion_config",
        "pruned_heads",
        "quantization_config",
        "transformers_weights",
    }
)
_MAY_BE_EMPTY = frozenset({"auto_map", "configuration_files", "custom_pipelines", "fusion_config", "pruned_heads"})
# Keys that a model takes otherwise where they are null than where they are not there, whether its config knows them or
# not: getattr(config, key, DEFAULT) with a default that counts as true, or a number.
_NULL_COUNTS = frozenset(
    {
        "apply_spec_augment",
        "beta",
        "classifier_dropout_rate",
        "conv_act",
        "conv_groups",
        "conv_kernel_size",
        "embedding_size",
        "head_dim",
        "hidden_act",
        "initializer_cutoff_factor",
        "initializer_range",
        "is_causal",
        "layerdrop",
        "max_relative_positions",
        "norm_rel_ebd",
        "num_attention_heads",
        "num_labels",
        "num_local_experts",
        "num_register_tokens",
        "position_biased_input",
        "position_buckets",
        "position_embedding_type",
        "return_dict",
        "summary_type",
        "swiglu_limit",
        "tie_word_embeddings",
        "token_classification_bias",
    }
)
_CODE_KEYS = ("auto_map", "custom_pipelines")  # what they name is REPOSITORY--MODULE.CLASS once it was on a hub
_ABSENT = object()
# Models whose tokenizer transformers 5 patches where this key of tokenizer_config.json is set and config.json is older.
_PATCH = "fix_mistral_regex"
_PATCHED = frozenset({"ministral", "mistral", "mistral3", "pixtral", "voxtral"})


def config_problems(path: Path, expected: PretrainedConfig, origins: Collection[str]) -> Findings:
    """Compare a config.json with the one that the recipe gives; return the differences.

    Args:
        path: The output's.
        expected: The config that the merge writes.
        origins: Where the recipe says that these models lie, and so whose code they may name.
    """
    if not path.exists():
        return Findings()
    content = _normal(read_json(path), origins)
    tokenizer = path.with_name("tokenizer_config.json")
    patched = str(content.get("model_type")) in _PATCHED and tokenizer.exists() and read_json(tokenizer).get(_PATCH)
    return _compare(path.name, content, expected, bool(patched), origins)


def _normal(content: dict[str, Any], origins: Collection[str]) -> dict[str, Any]:
    """Return a config with one name for dtype, and without the repositories of code that the recipe names itself."""
    result = {}
    for key, value in content.items():
        if key in _CODE_KEYS:
            result[key] = _local_code(value, origins)
        elif key in ("dtype", "torch_dtype"):  # transformers lets dtype win, unless it is null
            dtype = content.get("dtype")
            result["dtype"] = content.get("torch_dtype") if dtype is None else dtype
        else:
            result[key] = _normal(value, origins) if isinstance(value, dict) else value
    return result


def _local_code(value: Any, origins: Collection[str]) -> Any:
    if isinstance(value, str):
        repository, separator, name = value.rpartition("--")
        return name if separator and repository in origins else value
    if isinstance(value, dict):
        return {key: _local_code(item, origins) for key, item in value.items()}
    return [_local_code(item, origins) for item in value] if isinstance(value, list) else value


def _compare(
    file: str, content: dict[str, Any], expected: PretrainedConfig, patched: bool, origins: Collection[str]
) -> Findings:
    problems = Findings()
    # As save_pretrained writes it.
    written: dict[str, Any] = _normal(json.loads(expected.to_json_string()), origins)
    full: dict[str, Any] = _normal(json.loads(expected.to_json_string(use_diff=False)), origins)
    # What has its default need not be written.
    differences = [*_compare_objects(written, content, full)]
    other_version = content.get("transformers_version") != written["transformers_version"]
    if other_version or not differences:
        try:
            as_read = type(expected).from_dict(copy.deepcopy(content))  # transformers 5.0 writes into what it is given
            read = _normal(json.loads(as_read.to_json_string(use_diff=False)), ())
        except Exception as error:  # each config class checks what it likes
            problems.add(kinds.FILES_DISAGREE, file, problem=f"transformers cannot read it: {one_line(error)}")
            return problems
    if other_version:
        # Versions of transformers write other keys for the same: what both know of is compared as this one reads it.
        # None is what transformers takes for most keys that are not there.
        read = {key: value for key, value in read.items() if key in full or key in _NULL_COUNTS or value is not None}
        read["model_type"] = content.get("model_type", _ABSENT)  # that of the class, whatever the file says
        obeyed = {key: content[key] for key in _OBEYED_KEYS & content.keys()}
        differences = [*_compare_objects(full, {**read, **obeyed}, None)]
        if patched and _before_5(content) != _before_5(written):
            key = "transformers_version"
            differences.append((key, written[key], content.get(key, _ABSENT)))
    for difference in differences:
        problems.add(kinds.FILES_DISAGREE, file, problem=_text(*difference))
    return problems


def _compare_objects(
    expected: dict[str, Any], found: dict[str, Any], defaults: dict[str, Any] | None, place: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Compare two JSON objects, key by key.

    Args:
        expected: One.
        found: The other.
        defaults: Values that only ``found`` may give; None for a config as transformers read it.
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
            if defaults is None and key in _MAY_BE_EMPTY and right in ({}, []):  # as if it were not there
                continue
            if defaults is not None and key in found and defaults.get(key, _ABSENT) == right:
                continue
        if left != right:
            yield f"{place}{key}", left, right


def _before_5(config: dict[str, Any]) -> bool:
    found = re.match(r"\d+", str(config.get("transformers_version", "")))
    return found is None or int(found[0]) < 5


def _text(key: str, expected: object, found: object) -> str:
    if expected is _ABSENT:
        return f"{key} must not be set, as the recipe gives none, got {found!r}"
    got = "it is missing" if found is _ABSENT else f"got {found!r}"
    return f"{key} must be {expected!r}, as the recipe gives it, {got}"
