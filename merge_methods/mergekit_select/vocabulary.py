"""Build the output's tokenizer as mergekit would, to learn the rows of its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.tokenizer.build import TokenizerInfo, build_tokenizer
from mergekit.tokenizer.embed import PermutedVocabulary

from mergekit_select.checkpoints import TOKENIZER_FILES
from mergekit_select.findings import Findings, one_line
from mergekit_select.models import Model, with_stand_ins
from mergekit_select.planning import Plan, named
from mergekit_select.replay import no_bar_of_mergekits_own


def aligned_rows(
    config: MergeConfiguration,
    options: MergeOptions,
    models: Mapping[ModelReference, Model],
    plan: Plan,
    findings: Findings,
) -> int | None:
    """Return the rows of the output's vocabulary where the recipe has mergekit align tokenizers, else None."""
    local = with_stand_ins(config, models)
    source = local.tokenizer.source if local.tokenizer else local.tokenizer_source
    if source is None:
        _see_files(config, options, models, findings)
        return None
    tokens = (local.tokenizer.tokens if local.tokenizer else None) or {}
    place = "tokenizer" if local.tokenizer else "tokenizer_source"
    by_stand_in = {model.stand_in: model for model in models.values()}
    try:
        with no_bar_of_mergekits_own():
            info = build_tokenizer(
                base_model=local.base_model,
                # mergekit takes them from a set; in the recipe's order the size comes out the same.
                referenced_models=[model.stand_in for model in models.values()],
                tokenizer_source=source,
                trust_remote_code=options.trust_remote_code,
                add_tokens=list(tokens),
            )
    except Exception as error:
        message = f"mergekit cannot build the output's tokenizer: {named(error, by_stand_in)}"
        findings.error("tokenizer-invalid", place, str(source), message, "give every model its tokenizer files")
        return None
    rows = len(info.tokenizer.get_vocab())
    multiple = local.tokenizer.pad_to_multiple_of if local.tokenizer else None
    if multiple:
        rows = -(-rows // multiple) * multiple
    for planned in plan.tensors:
        if planned.weight.vocabulary_axis is not None:
            users = [model for model, _ in planned.inputs]
            shapes = [_shape(model, planned.weight) for model in users]
            _rows_exist(info, planned.name, planned.weight.vocabulary_axis, users, shapes, findings)
            _configured(info, local, planned.name, planned.weight.vocabulary_axis, users, shapes, findings)
    return rows


def _shape(model: Model, weight: object) -> tuple[int, ...] | None:
    tensors = model.checkpoint.tensors or {}
    for name in (weight.name, *(weight.aliases or ()), *(weight.tied_names or ())):  # type: ignore[attr-defined]  # WeightInfo
        if name in tensors:
            return tensors[name].shape
    return None


def _rows_exist(
    info: TokenizerInfo,
    name: str,
    axis: int,
    users: Sequence[Model],
    shapes: Sequence[tuple[int, ...] | None],
    findings: Findings,
) -> None:
    """Every token of the output must have a row, or none, in each model; mergekit fails on others halfway."""
    wanted = set(info.tokenizer.get_vocab().values())
    for model, shape in zip(users, shapes, strict=True):
        rows = info.permutations.get(model.stand_in)
        if shape is None or rows is None or len(shape) <= axis:
            continue
        highest = max(rows.values(), default=-1)
        if highest >= shape[axis] or not wanted <= rows.keys():
            findings.error(
                "tokenizer-invalid",
                f"{model}, tensor {name}",
                f"id {highest}" if highest >= shape[axis] else "ids beyond config.json's vocab_size",
                f"every token of the tokenizer must have a row in the model's vocabulary, and this has {shape[axis]}",
                "give the model its own tokenizer, or resize its embeddings",
            )


def _configured(
    info: TokenizerInfo,
    config: MergeConfiguration,
    name: str,
    axis: int,
    users: Sequence[Model],
    shapes: Sequence[tuple[int, ...] | None],
    findings: Findings,
) -> None:
    """Look up the rows that the recipe gives to tokens, on tensors without data."""
    tokens = (config.tokenizer.tokens if config.tokenizer else None) or {}
    tensors = {
        model.stand_in: torch.empty(shape, device="meta").movedim(axis, 0)
        for model, shape in zip(users, shapes, strict=True)
        if shape is not None
    }
    ids = info.tokenizer.get_vocab()
    # A method that uses nothing of the task it belongs to.
    look_up: Any = PermutedVocabulary.compute_default_embedding
    for token, settings in tokens.items():
        rows = [info.permutations.get(reference, {}).get(ids[token], -1) for reference in tensors]
        if not tensors or (not settings.force and min(rows) >= 0):
            continue  # every model brings a row of its own
        if settings.source is None:
            findings.error(
                "tokenizer-invalid",
                f"tokenizer.tokens.{token}",
                "",
                f"a token must have a source where {'force is set' if settings.force else 'a model lacks it'}; "
                f"mergekit cannot make its row of {name}",
                "give it a source, such as {kind: zero} or a model that has it",
            )
            continue
        try:
            look_up(None, info, tensors, info.permutations, token, ids[token], settings)
        except Exception as error:
            findings.error(
                "tokenizer-invalid",
                f"tokenizer.tokens.{token}",
                "",
                f"mergekit cannot take the row for {name} from there: {one_line(error) or type(error).__name__}",
                "name a model of the merge that has the token",
            )


def _see_files(
    config: MergeConfiguration, options: MergeOptions, models: Mapping[ModelReference, Model], findings: Findings
) -> None:
    donor = models[config.base_model] if config.base_model else next(iter(models.values()))
    if options.copy_tokenizer and not any((donor.checkpoint.folder / file).exists() for file in TOKENIZER_FILES):
        findings.warning(
            "tokenizer-missing",
            donor.places[0],
            str(donor),
            "mergekit copies the tokenizer from this model, and it has none",
            "copy one into the output, or give --no-copy-tokenizer",
        )
