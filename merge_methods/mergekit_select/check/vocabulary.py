"""Check the output's vocabulary: whether mergekit can align tokenizers, and whether config and rows agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import get_config_value
from mergekit.tokenizer.build import TokenizerInfo
from mergekit.tokenizer.config import TokenizerConfig
from transformers import PretrainedConfig

from mergekit_select import kinds
from mergekit_select.check.merge import DescribedTensor, MergeUnderCheck, Model
from mergekit_select.check.tensors import names_of
from mergekit_select.errors import one_line
from mergekit_select.inputs.files import TOKENIZER_FILES
from mergekit_select.planner import vocabulary
from mergekit_select.planner.plan import Plan, PlannedTensor


def check_alignment(merge: MergeUnderCheck, plan: Plan) -> int | None:
    """Return the rows of the output's vocabulary where the recipe has mergekit align tokenizers, else None."""
    local = merge.with_stand_ins(merge.config)
    source = vocabulary.tokenizer_source(local)
    if source is None:
        _see_files(merge)
        return None
    try:
        stand_ins = [model.stand_in for model in merge.models.values()]
        info = vocabulary.build(local, merge.options, stand_ins)
    except Exception as error:  # mergekit, tokenizers and transformers each have errors of their own
        place = "tokenizer" if local.tokenizer else "tokenizer_source"
        merge.findings.add(kinds.TOKENIZER_INVALID, place, source, problem=merge.explain(error))
        return None
    for planned in plan.tensors:
        axis = planned.weight.vocabulary_axis
        if axis is not None:
            users = [merge.models[reference] for reference, _ in planned.inputs]
            shapes = [(model, shape) for model in users if (shape := _shape(model, planned.weight)) is not None]
            _rows_exist(merge, info, planned.name, axis, shapes)
            if local.tokenizer is not None:
                _configured(merge, info, local.tokenizer, planned, axis, shapes)
    return vocabulary.row_count(local, info)


_Shapes = Sequence[tuple[Model, tuple[int, ...]]]


def _shape(model: Model, weight: WeightInfo) -> tuple[int, ...] | None:
    tensors = model.checkpoint.tensors or {}
    return next((tensors[name].shape for name in names_of(weight) if name in tensors), None)


def _rows_exist(merge: MergeUnderCheck, info: TokenizerInfo, tensor: str, axis: int, shapes: _Shapes) -> None:
    """Every token of the output must have a row, or none, in each model; mergekit fails on others halfway."""
    wanted = set(info.tokenizer.get_vocab().values())
    for model, shape in shapes:
        rows = info.permutations.get(model.stand_in)
        if rows is None or len(shape) <= axis:
            continue
        highest = max(rows.values(), default=-1)
        if highest >= shape[axis] or not wanted <= rows.keys():
            value = f"id {highest}" if highest >= shape[axis] else "ids beyond config.json's vocab_size"
            merge.findings.add(kinds.TOKENIZER_ROWS, f"{model}, tensor {tensor}", value, rows=shape[axis])


def _configured(
    merge: MergeUnderCheck,
    info: TokenizerInfo,
    config: TokenizerConfig,
    planned: PlannedTensor,
    axis: int,
    shapes: _Shapes,
) -> None:
    """Look up the rows that the recipe gives to tokens, on tensors without data."""
    tensors = {model.stand_in: torch.empty(shape, device="meta").movedim(axis, 0) for model, shape in shapes}
    ids = info.tokenizer.get_vocab()
    for token, settings in (config.tokens or {}).items():
        rows = [info.permutations.get(reference, {}).get(ids[token], -1) for reference in tensors]
        if not tensors or (not settings.force and min(rows) >= 0):
            continue  # every model brings a row of its own
        place = f"tokenizer.tokens.{token}"
        if settings.source is None:
            reason = "force is set" if settings.force else "a model lacks it"
            merge.findings.add(kinds.TOKEN_WITHOUT_SOURCE, place, reason=reason, tensor=planned.name)
            continue
        try:
            vocabulary.look_up_row(info, tensors, token, settings)
        except Exception as error:  # mergekit's own, of any kind
            merge.findings.add(kinds.TOKEN_SOURCE_INVALID, place, tensor=planned.name, problem=one_line(error))


def _see_files(merge: MergeUnderCheck) -> None:
    donor = merge.donor
    if merge.options.copy_tokenizer and not any((donor.checkpoint.folder / file).exists() for file in TOKENIZER_FILES):
        merge.findings.add(kinds.TOKENIZER_MISSING, donor.places[0], donor)


def check_vocabulary(merge: MergeUnderCheck, plan: Plan, written: Sequence[DescribedTensor]) -> None:
    """The output's embeddings must have the rows that its config says, or transformers does not load it."""
    key = plan.architecture.vocab_size_config_key or "vocab_size"
    try:
        configured = get_config_value(plan.out_config, key)
    except (AttributeError, RuntimeError):  # models of other things than text have none
        return
    # Some architectures have a second vocabulary, with a size of its own.
    configs = (plan.out_config, plan.out_config.get_text_config())
    # mergekit merges a model whose text_config is a number.
    sizes = {size for one in configs if isinstance(one, PretrainedConfig) for size in _sizes(one)} | {configured}
    axes = {planned.name: planned.weight.vocabulary_axis for planned in plan.tensors}
    for tensor in written:
        axis, shape = axes.get(tensor.name), tensor.tensor.shape
        if isinstance(configured, int) and axis is not None and len(shape) > axis and shape[axis] not in sizes:
            value = f"{key} {configured}, {shape[axis]} rows"
            merge.findings.add(kinds.VOCABULARY_CONFIG, f"tensor {tensor.name}", value, key=key, donor=merge.donor)


def _sizes(settings: PretrainedConfig) -> list[object]:
    return [value for name, value in settings.to_dict().items() if "vocab" in name and isinstance(value, int)]
