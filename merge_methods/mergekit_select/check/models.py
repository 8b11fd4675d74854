"""Check models side by side: quantisation, files, ties, the donor of config and tokenizer, and token ids."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration

from mergekit_select import kinds
from mergekit_select.check.merge import MergeUnderCheck, Model
from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.findings import Findings, some
from mergekit_select.inputs.bounds import MOST_JSON_BYTES, read_file
from mergekit_select.inputs.checkpoint import Checkpoint
from mergekit_select.inputs.files import TOKENIZER_FILES, read_json
from mergekit_select.inputs.recipe import left_recipe
from mergekit_select.inputs.references import donor
from mergekit_select.methods import OWN
from mergekit_select.planner.plan import Plan

# Names of the scales and packed weights that quantised checkpoints hold.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state\..*|weight_scale(_inv)?|input_scale|"
    r"weight_packed|weight_format|blocks|weight_zero_point)$"
)
# Keys of config.json in which a donor may differ from another without any effect.
_IRRELEVANT = {"_name_or_path", "transformers_version", "use_cache"}


def check_models(merge: MergeUnderCheck) -> None:
    """Add what is wrong with the models that are merged, each for itself and side by side."""
    for model in merge.merged:
        _quantised(model, merge.findings)
    _same_files(merge.merged, merge.findings)
    _ties(merge.merged, merge.findings)
    _seeds(merge)


def _quantised(model: Model, findings: Findings) -> None:
    settings = model.checkpoint.config.get("quantization_config")
    scales = [name for name in model.checkpoint.tensors or () if _QUANTISED.search(name)]
    if settings or scales:
        method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
        what = f"quantization_config with quant_method {method}" if settings else some(scales)
        findings.add(kinds.MODEL_QUANTISED, model.places[0], model, what=what)


def _same_files(models: Sequence[Model], findings: Findings) -> None:
    # In slices and passthrough one model may well serve twice; there it is one reference. Copies are not found: equal
    # headers and sizes are what every run of one base has, and more takes reading, which is left to inspect.
    seen: dict[frozenset[object], Model] = {}
    for model in models:
        files = model.checkpoint.files
        if files and files in seen and seen[files].reference.lora == model.reference.lora:
            other = seen[files]
            findings.add(kinds.SAME_FILE, model.places[0], model, other=other, place=other.places[0])
        seen.setdefault(files, model)


def _ties(models: Sequence[Model], findings: Findings) -> None:
    tied = [model for model in models if model.checkpoint.tied]
    untied = [model for model in models if not model.checkpoint.tied]
    if tied and untied:
        findings.add(kinds.TIES_DIFFER, "models", f"tied in {some(tied)}; untied in {some(untied)}")


def _seeds(merge: MergeUnderCheck) -> None:
    seed = _seed(merge.config)
    if seed is None:
        return
    for model in merge.merged:
        if model.reference == merge.config.base_model:  # never drawn
            continue
        made_by = left_recipe(model.checkpoint.folder)
        if made_by is not None and _seed(made_by) == seed:
            merge.findings.add(kinds.SEED_REPEATS, model.places[0], model, seed=seed)


def _seed(config: MergeConfiguration) -> int | None:
    """The seed that a selection draws with; None for other methods, and for what is no seed."""
    seed = (config.parameters or {}).get("seed", 0)
    return seed if config.merge_method in OWN and type(seed) is int else None


def check_donor(merge: MergeUnderCheck) -> None:
    """Without a base model, say whether it matters which one mergekit takes config and tokenizer from."""
    models = merge.merged
    if donor(merge.config) is not None:
        return
    first = _donated(models[0].checkpoint)
    differing = [model for model in models[1:] if _donated(model.checkpoint) != first]
    if differing:
        merge.findings.add(kinds.NO_BASE_MODEL, "base_model", f"{differing[0]} differs from {models[0]}")
    else:
        merge.findings.add(kinds.NO_BASE_MODEL_BUT_EQUAL, "base_model")


def check_templates(merge: MergeUnderCheck) -> None:
    """Say where mergekit looks for the template that most models have, and several are as frequent."""
    if merge.config.chat_template != "auto":
        return
    models = [merge.models[reference] for reference in merge.config.referenced_models() if reference in merge.models]
    found = Counter(text for model in models if (text := _template(model.checkpoint.folder)))
    tied = [text for text, times in found.items() if times == max(found.values())]
    if len(tied) > 1:
        merge.findings.add(kinds.CHAT_TEMPLATE_TIED, "chat_template", "auto", count=len(tied))


def _template(folder: Path) -> str:
    """Return a tokenizer's chat template; nothing where it has none, or none that is plain."""
    with suppress(UnreadableError, ValueError):
        if (folder / "chat_template.jinja").exists():
            return read_file(folder / "chat_template.jinja", MOST_JSON_BYTES).decode().strip()
        if (folder / "tokenizer_config.json").exists():
            template = read_json(folder / "tokenizer_config.json").get("chat_template")
            return template.strip() if isinstance(template, str) else ""
    return ""


def _donated(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[bytes | None]]:
    """Return what the output would take over; equal ids are left to ``check_tokenizers``."""
    config = {key: value for key, value in checkpoint.config.items() if key not in _IRRELEVANT}
    files = (checkpoint.folder / name for name in TOKENIZER_FILES)
    return config, [read_file(file, MOST_JSON_BYTES) if file.exists() else None for file in files]


def check_tokenizers(merge: MergeUnderCheck, plan: Plan) -> None:
    """Compare the ids that tokenizers give to tokens; equal sizes do not prove equal ids.

    Those are compared whose vocabulary rows or tokenizer files go into the output.
    """
    groups = [planned.inputs for planned in plan.tensors if planned.weight.vocabulary_axis is not None]
    shared = any(len(group) > 1 for group in groups)  # rows of several models meet in one tensor
    known_donor = donor(merge.config)
    order = [*([known_donor] if known_donor else []), *(model for group in groups for model, _ in group)]
    users = [merge.models[reference] for reference in dict.fromkeys(order)]
    known = [(model, ids) for model in users if (ids := _token_ids(model, merge.findings)) is not None]
    for other, other_ids in known[1:]:
        first, first_ids = known[0]
        if first_ids == other_ids:
            continue
        conflict = _conflict(first_ids, other_ids)
        # Rows for other tokens that stand at the same id are blended: the output speaks a mixed language.
        kind = kinds.TOKENIZERS_CONFLICT if conflict and shared else kinds.TOKENIZERS_DIFFER
        sizes = f"{len(first_ids)} tokens in {first}, {len(other_ids)} in {other}"
        merge.findings.add(kind, other.places[0], conflict or sizes, other=other, first=first)


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
    folder = model.checkpoint.folder
    try:
        ids = token_ids(folder)
        if ids is not None and not all(isinstance(key, str) and type(number) is int for key, number in ids.items()):
            raise ValueError("tokens must be text, and their ids whole numbers")
        return ids
    except (UnreadableError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        findings.add(kinds.TOKENIZER_UNREADABLE, model.places[0], model, folder=folder, problem=one_line(error))
        return None


def token_ids(folder: Path) -> dict[str, int] | None:
    """Return a tokenizer's ids by token, or None where no file tells them without sentencepiece."""
    if (folder / "tokenizer.json").exists():
        described = json.loads(read_file(folder / "tokenizer.json", MOST_JSON_BYTES))
        vocabulary: Any = described["model"].get("vocab", {})
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score, in the order of ids
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in described.get("added_tokens", ())}
        return {**vocabulary, **added}
    if (folder / "vocab.json").exists():
        vocabulary = json.loads(read_file(folder / "vocab.json", MOST_JSON_BYTES))
        extra = folder / "added_tokens.json"
        return {**vocabulary, **(json.loads(read_file(extra, MOST_JSON_BYTES)) if extra.exists() else {})}
    if (folder / "vocab.txt").exists():
        lines = read_file(folder / "vocab.txt", MOST_JSON_BYTES).decode("utf-8").splitlines()
        return {token: number for number, token in enumerate(lines)}
    return None
