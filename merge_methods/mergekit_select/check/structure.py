"""Check that the models fit together, and plan the merge with mergekit's own planner, from descriptions alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit.architecture import ModelArchitecture, arch_info_for_config, get_architecture_info
from mergekit.config import MergeConfiguration

from mergekit_select import kinds
from mergekit_select.check.merge import MergeUnderCheck, Model
from mergekit_select.findings import some
from mergekit_select.planner.internals import isolated, offer_names
from mergekit_select.planner.plan import Plan, Planning


def plan_merge(merge: MergeUnderCheck) -> Plan | None:
    """Return the plan, or None with the reason added."""
    local = merge.with_stand_ins(merge.config)
    with isolated(merge.options):
        architecture = _architecture(merge, local)
        if architecture is None:
            return None
        for model in merge.models.values():
            offer_names(model.stand_in, model.checkpoint.tensors or {})
        try:
            planning = Planning(local, architecture, merge.options)
            if not _fits(merge, planning):
                return None
            return planning.plan(merge.config, {model.stand_in: name for name, model in merge.models.items()})
        except Exception as error:
            merge.findings.add(kinds.PLAN_FAILED, "recipe", problem=merge.explain(error))
            return None


def _architecture(merge: MergeUnderCheck, local: MergeConfiguration) -> ModelArchitecture | None:
    """Return mergekit's description of the models, or None where they have none in common."""
    architectures = {model: found for model in merge.merged if (found := _architecture_of(merge, model)) is not None}
    models = [*architectures]
    if len(models) < len(merge.merged):
        return None
    known = all(architectures.values())
    odd = [model for model in models if architectures[model] != architectures[models[0]]]
    if odd and known:
        allowed = merge.options.allow_crimes
        names = [" ".join(map(str, model.checkpoint.config.get("architectures", ()))) for model in (models[0], odd[0])]
        kind = kinds.ARCHITECTURE_DIFFERS_ALLOWED if allowed else kinds.ARCHITECTURE_DIFFERS
        merge.findings.add(kind, odd[0].places[0], f"{names[1]} in {odd[0]}, {names[0]} in {models[0]}")
        if not allowed:
            return None
    unknown = [model for model in models if model.checkpoint.tensors is None]
    if unknown:
        merge.findings.add(kinds.WEIGHTS_NOT_KNOWN, "models", some(unknown))
        return None
    adapters = [model for model in models if model.reference.lora is not None]
    if not known and adapters:
        merge.findings.add(kinds.LORA_ARCHITECTURE, adapters[0].places[0], adapters[0])
        return None
    try:
        return get_architecture_info(local, merge.options)
    except Exception as error:
        merge.findings.add(kinds.ARCHITECTURE_NOT_INFERRED, "models", some(models), problem=merge.explain(error))
        return None


def _architecture_of(merge: MergeUnderCheck, model: Model) -> Any:
    """Return mergekit's description of one model, False if it has none of its own, or None with the reason added."""
    trusted = merge.options.trust_remote_code
    try:
        settings = merge.settings(model.stand_in)
        if len(settings.architectures or ()) != 1:
            raise ValueError(f"architectures must name one class, and is {settings.architectures}")
        return arch_info_for_config(settings) or False
    except Exception as error:
        if trusted and "auto_map" in model.checkpoint.config and not model.checkpoint.plain:
            merge.findings.add(kinds.REMOTE_CODE, model.places[0], model)
        else:
            merge.findings.add(kinds.CONFIG_INVALID, model.places[0], model, problem=merge.explain(error))
        return None


def _fits(merge: MergeUnderCheck, planning: Planning) -> bool:
    """Normalise the recipe and compare layers, which mergekit does while planning and says less about."""
    try:
        planning.normalise()
    except ValueError as error:
        problem = merge.explain(error)
        kind, place = kinds.INPUTS, "models"
        if problem.startswith("Merge method requires a base input"):
            kind, place = kinds.BASE_MISSING, "base_model"
        elif problem.startswith("Base input is not present") and merge.config.slices:
            kind, place = kinds.BASE_NOT_A_SOURCE, "slices"
        merge.findings.add(kind, place, problem=problem, method=merge.config.merge_method)
        return False
    except Exception as error:
        merge.findings.add(kinds.PLAN_FAILED, "models", problem=merge.explain(error))
        return False
    good = True
    modules = planning.config.modules or {}
    models = {model.stand_in: model for model in merge.models.values()}
    for name, module in modules.items():
        architecture = planning.arch_info.modules[name].architecture
        prefix = f"modules.{name}." if len(modules) > 1 else ""
        slices = [[(models[s.model], s) for s in output.sources] for output in module.slices or ()]
        for number, sources in enumerate(slices):
            good &= _layers(merge, f"{prefix}slices[{number}]", sources, architecture)
        _last_slice(merge, f"{prefix}slices", slices, architecture)
    return good


def _layers(merge: MergeUnderCheck, place: str, sources: Sequence[tuple[Model, Any]], architecture: Any) -> bool:
    """Compare the layers that one slice takes with those that its models have."""
    good = True
    for model, source in sources:
        first, end = source.layer_range
        count = architecture.num_layers(merge.settings(source.model))
        if not 0 <= first <= end <= count:
            good = False
            merge.findings.add(kinds.LAYER_RANGE, f"{place}.layer_range", f"{[first, end]} of {model}", count=count)
    lengths = {model: source.layer_range[1] - source.layer_range[0] for model, source in sources}
    if good and len(set(lengths.values())) > 1:
        good = False
        value = some((f"{count} in {model}" for model, count in lengths.items()), 4)
        merge.findings.add(kinds.LAYERS_DIFFER, place, value)
    return good


def _last_slice(
    merge: MergeUnderCheck, place: str, slices: Sequence[Sequence[tuple[Model, Any]]], architecture: Any
) -> None:
    """The tensors after the layers are merged from as many models of the last slice as the first one has."""
    if not slices or len(slices[-1]) <= len(slices[0]):
        return
    first, last = slices[0], slices[-1]
    after = [weight.name for weight in architecture.post_weights(merge.settings(last[0][1].model))]
    if after:
        merge.findings.add(
            kinds.SLICES_UNEVEN,
            place,
            f"{len(first)} in the first, {len(last)} in the last",
            after=some(after),
            taken=some(model for model, _ in last[: len(first)]),
            left=some(model for model, _ in last[len(first) :]),
        )
