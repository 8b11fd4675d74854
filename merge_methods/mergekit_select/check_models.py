"""Findings that models give when compared with each other: configs, tokenizers, ties, files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration

from mergekit_select.checkpoints import TOKENIZER_FILES, Checkpoint
from mergekit_select.findings import Findings, one_line, some
from mergekit_select.models import Model

_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state\..*|weight_scale(_inv)?|input_scale|"
    r"weight_packed|weight_format|blocks|weight_zero_point)$"
)
_IRRELEVANT = {"_name_or_path", "transformers_version", "use_cache"}


def check_models(config: MergeConfiguration, models: Sequence[Model], findings: Findings) -> None:
    """Add what is wrong with the models, each for itself and side by side."""
    for model in models:
        _quantised(model, findings)
    _same_files(config, models, findings)
    _ties(models, findings)


def _quantised(model: Model, findings: Findings) -> None:
    settings = model.checkpoint.config.get("quantization_config")
    scales = [name for name in model.checkpoint.tensors or () if _QUANTISED.search(name)]
    if not settings and not scales:
        return
    method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
    what = f"quantization_config with quant_method {method}" if settings else some(scales)
    findings.error(
        "model-quantised",
        model.places[0],
        str(model),
        f"a model must be unquantised to be merged, and this one has {what}",
        "use the original model, or one that is dequantised and saved again",
    )


def _same_files(config: MergeConfiguration, models: Sequence[Model], findings: Findings) -> None:
    # In slices and passthrough one model may well serve twice; there it is one reference.
    seen: dict[frozenset[object], Model] = {}
    for model in models:
        files = model.checkpoint.files
        if files and files in seen and seen[files].reference.lora == model.reference.lora:
            findings.warning(
                "same-file",
                model.places[0],
                str(model),
                f"sub-models should differ, and this is the same file as {seen[files]} ({seen[files].places[0]})",
                "give another model, or a higher weight if that is meant",
            )
        seen.setdefault(files, model)


def _ties(models: Sequence[Model], findings: Findings) -> None:
    tied = [model for model in models if model.checkpoint.tied]
    untied = [model for model in models if not model.checkpoint.tied]
    if tied and untied:
        findings.warning(
            "ties-differ",
            "models",
            f"tied in {some(tied)}; untied in {some(untied)}",
            "models must agree on tie_word_embeddings: lm_head and embed_tokens are merged separately, and the "
            "output's config may then have transformers drop one of them",
            "save the tied models untied, with lm_head.weight stored, or choose others",
        )


def check_donor(config: MergeConfiguration, models: Sequence[Model], findings: Findings) -> None:
    """Without a base model, say whether it matters which one mergekit takes config and tokenizer from."""
    if config.base_model is not None or len(models) < 2:
        return
    first = _donated(models[0].checkpoint)
    differing = [model for model in models[1:] if _donated(model.checkpoint) != first]
    if differing:
        findings.warning(
            "no-base-model",
            "base_model",
            f"{differing[0]} differs from {models[0]}",
            "without base_model mergekit takes config and tokenizer from an arbitrary model, and they differ",
            "set base_model where the method allows one, or make config and tokenizer files equal",
        )
    else:
        findings.note(
            "no-base-model",
            "base_model",
            "",
            "without base_model mergekit takes config and tokenizer from an arbitrary model; here they are equal",
            "nothing needs doing",
        )


def _donated(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[bytes | None]]:
    """What the output would take over; equal ids are left to ``check_tokenizers``."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _IRRELEVANT}
    files = (checkpoint.folder / name for name in TOKENIZER_FILES)
    return config, [file.read_bytes() if file.exists() else None for file in files]


def check_tokenizers(users: Sequence[Model], shared: bool, findings: Findings) -> None:
    """Compare the ids that tokenizers give to tokens; equal sizes do not prove equal ids.

    Args:
        users: Models whose vocabulary rows or tokenizer files go into the output.
        shared: Whether rows of several models meet in one tensor.
        findings: Where to add what differs.
    """
    known = [(model, ids) for model in users if (ids := _token_ids(model, findings)) is not None]
    for (first, first_ids), (other, other_ids) in zip(known[:1] * len(known[1:]), known[1:], strict=True):
        if first_ids == other_ids:
            continue
        conflict = _conflict(first_ids, other_ids)
        # Rows for other tokens that stand at the same id are blended: the output speaks a mixed language.
        add = findings.error if conflict and shared else findings.warning
        add(
            "tokenizers-differ",
            other.places[0],
            conflict or f"{len(first_ids)} tokens in {first}, {len(other_ids)} in {other}",
            f"tokens must have the same ids in all models, and {other} differs from {first}",
            "add tokenizer: {source: base} to the recipe, so that mergekit aligns the rows",
        )


def _conflict(first: Mapping[str, int], other: Mapping[str, int]) -> str:
    for token, number in other.items():
        if token in first and first[token] != number:
            return f"token {token!r} is {first[token]} in one and {number} in the other"
    of_first, of_other = ({number: token for token, number in ids.items()} for ids in (first, other))
    for number, token in of_other.items():
        if number in of_first and of_first[number] != token:
            return f"id {number} is {of_first[number]!r} in one and {token!r} in the other"
    return ""


def _token_ids(model: Model, findings: Findings) -> Mapping[str, int] | None:
    try:
        return token_ids(model.checkpoint.folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = f"the tokenizer files in {model.checkpoint.folder} cannot be read: {one_line(error)}"
        findings.warning("tokenizer-invalid", model.places[0], str(model), message, "copy or download the model again")
        return None


def token_ids(folder: Path) -> dict[str, int] | None:
    """Return a tokenizer's ids by token, or None where no file tells them without sentencepiece."""
    if (folder / "tokenizer.json").exists():
        described = json.loads((folder / "tokenizer.json").read_bytes())
        vocabulary: Any = described["model"].get("vocab", {})
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score, in the order of ids
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in described.get("added_tokens", ())}
        return {**vocabulary, **added}
    if (folder / "vocab.json").exists():
        vocabulary = json.loads((folder / "vocab.json").read_bytes())
        extra = folder / "added_tokens.json"
        return {**vocabulary, **(json.loads(extra.read_bytes()) if extra.exists() else {})}
    if (folder / "vocab.txt").exists():
        lines = (folder / "vocab.txt").read_text("utf-8").splitlines()
        return {token: number for number, token in enumerate(lines)}
    return None
