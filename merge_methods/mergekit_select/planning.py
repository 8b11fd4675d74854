"""Plan a merge with mergekit's own planner, from descriptions of the models alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mergekit.architecture import ModelArchitecture, WeightInfo, arch_info_for_config, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_select.findings import Findings, one_line, some
from mergekit_select.models import Model, with_stand_ins

_lock = threading.Lock()


@dataclass(frozen=True)
class Planned:
    """One tensor of the output.

    Attributes:
        name: Its name in the output.
        weight: mergekit's description of it.
        inputs: What is loaded for it: model and mergekit's description there, in recipe order.
        base: The base model at this place.
        shared: Resolved parameters of the whole merge.
        per_input: Resolved parameters of each model.
    """

    name: str
    weight: WeightInfo
    inputs: tuple[tuple[Model, WeightInfo], ...]
    base: Model | None
    shared: Mapping[str, Any]
    per_input: Mapping[Model, Mapping[str, Any]]


@dataclass
class Plan:
    """What mergekit would do.

    Attributes:
        tensors: In mergekit's order.
        architecture: mergekit's description of the models.
        inferred: Whether mergekit found no description of its own, and inferred one from names.
        failures: Tensors that could not be planned, with the cause, and its text in the recipe's terms.
    """

    architecture: ModelArchitecture
    inferred: bool
    tensors: list[Planned] = field(default_factory=list)
    failures: list[tuple[str, Exception, str]] = field(default_factory=list)


class _Planner(MergePlanner):
    """A planner that goes on after a tensor that fails, so that all are reported."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.failures: list[tuple[str, Exception]] = []
        self.planned: list[tuple[WeightInfo, Sequence[WeightInfo], ExecuteMergeMethodTask]] = []

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        before = len(self._tensors)
        try:
            super().plan_tensor(weight, weights_in, models, cfg_reader)
        except Exception as error:
            self.failures.append((weight.name, error))
            return
        if len(self._tensors) > before:
            task = self._tensors[-1][1]
            assert isinstance(task, ExecuteMergeMethodTask)
            self.planned.append((weight, weights_in, task))


def plan_merge(
    config: MergeConfiguration, options: MergeOptions, models: Mapping[ModelReference, Model], findings: Findings
) -> Plan | None:
    """Return the plan, or None with the reason added.

    Args:
        config: The merge, not changed.
        options: Its options.
        models: Every model that it names.
        findings: Where to add what keeps mergekit from planning.
    """
    # The planner changes the configuration it is given; this is a copy.
    local = with_stand_ins(config, models)
    by_stand_in = {model.stand_in: model for model in models.values()}
    architecture = _architecture(local, options, by_stand_in, findings)
    if architecture is None:
        return None
    plan, readable = (
        architecture,
        {reference: model.checkpoint.tensors or {} for reference, model in by_stand_in.items()},
    )
    with _loaders(readable):
        try:
            planner = _Planner(local, plan.architecture, options, _model_out_config(local, plan.architecture))
            if not _fits(planner, by_stand_in, findings):
                return None
            for module, definition in local.modules.items():
                planner.plan_module(module, definition)
        except Exception as error:
            message = f"mergekit cannot plan the merge: {named(error, by_stand_in)}"
            findings.error("plan-failed", "recipe", "", message, "correct what it names")
            return None
    plan.failures += [(name, error, named(error, by_stand_in)) for name, error in planner.failures]
    for weight, weights_in, task in planner.planned:
        # mergekit pairs the models of the last slice with the number of sources of the first.
        order = tuple(zip((by_stand_in[reference] for reference in task.model_order), weights_in, strict=False))
        plan.tensors.append(
            Planned(
                weight.name,
                weight,
                order,
                by_stand_in[task.base_model] if task.base_model else None,
                dict(task.parameters.items()),
                {by_stand_in[r]: dict(values.items()) for r, values in task.input_parameters.items()},
            )
        )
    return plan


def _architecture(
    config: MergeConfiguration, options: MergeOptions, models: Mapping[ModelReference, Model], findings: Findings
) -> Plan | None:
    found: dict[Model, Any] = {}
    for reference in config.referenced_models():
        model = models[reference]
        try:
            settings = reference.config(trust_remote_code=options.trust_remote_code)
            if len(settings.architectures or ()) != 1:
                raise ValueError(f"architectures must name one class, and is {settings.architectures}")
            found[model] = arch_info_for_config(settings)
        except Exception as error:
            if options.trust_remote_code and "auto_map" in model.checkpoint.config and not model.checkpoint.plain:
                message = "the model brings code of its own, which check does not download"
                findings.note("remote-code", model.places[0], str(model), message, "download the model to check it")
            else:
                message = f"transformers or mergekit cannot use its config.json: {named(error, models)}"
                remedy = (
                    "correct it, upgrade transformers, or give --trust-remote-code if the model brings its own code"
                )
                findings.error("config-invalid", model.places[0], str(model), message, remedy)
    if len(found) < len(models.keys() & set(config.referenced_models())):
        return None
    ordered = [model for model in models.values() if model in found]
    known = all(architecture is not None for architecture in found.values())
    odd = [model for model in ordered if found[model] != found[ordered[0]]]
    if odd and known:
        names = [" ".join(map(str, model.checkpoint.config.get("architectures", ()))) for model in (ordered[0], odd[0])]
        add = findings.warning if options.allow_crimes else findings.error
        add(
            "architecture-differs",
            odd[0].places[0],
            f"{names[1]} in {odd[0]}, {names[0]} in {ordered[0]}",
            "models must have one architecture for mergekit to merge them",
            "choose models of one architecture, or give --allow-crimes if you know better",
        )
        if not options.allow_crimes:
            return None
    unknown = [str(model) for model in ordered if model.checkpoint.tensors is None]
    if unknown:
        message = "the names and shapes of its tensors cannot be known without downloading the weights"
        findings.note("not-known", "models", some(unknown), message, "download the model to check it")
        return None
    adapters = [model for model in ordered if model.reference.lora is not None]
    if not known and adapters:
        findings.error(
            "lora-cache",
            adapters[0].places[0],
            str(adapters[0]),
            "mergekit infers this architecture from tensor names, and cannot do so for LoRA adapters",
            "merge the adapter into its model with peft, and give the result",
        )
        return None
    try:
        return Plan(get_architecture_info(config, options), not known)
    except Exception as error:
        message = f"mergekit cannot infer the architecture: {named(error, models)}"
        findings.error("plan-failed", "models", some(ordered), message, "choose models that mergekit knows")
        return None


def _fits(planner: _Planner, models: Mapping[ModelReference, Model], findings: Findings) -> bool:
    """Normalise the recipe and compare layers, which mergekit does while planning and says less about."""
    try:
        planner.normalize_config()  # type: ignore[no-untyped-call]  # mergekit has no types
    except Exception as error:
        own = isinstance(error, ValueError)
        findings.error(
            "inputs" if own else "plan-failed",
            "models",
            "",
            named(error, models),
            f"see what {planner.config.merge_method} takes, and name each model once"
            if own
            else "correct what it names",
        )
        return False
    good = True
    modules = planner.config.modules or {}
    for name, module in modules.items():
        architecture = planner.arch_info.modules[name].architecture
        for number, output in enumerate(module.slices or ()):
            place = f"modules.{name}.slices[{number}]" if len(modules) > 1 else f"slices[{number}]"
            good &= _layers(place, output.sources, architecture, models, findings)
        _ends(name if len(modules) > 1 else "", module.slices or (), architecture, models, findings)
    return good


def _ends(
    module: str, slices: Sequence[Any], architecture: Any, models: Mapping[ModelReference, Model], findings: Findings
) -> None:
    """The tensors after the layers are merged from as many models of the last slice as the first one has."""
    if not slices or len(slices[-1].sources) <= len(slices[0].sources):
        return
    config = slices[-1].sources[0].model.config()
    after = [weight.name for weight in architecture.post_weights(config)]
    if after:
        taken, left = slices[-1].sources[: len(slices[0].sources)], slices[-1].sources[len(slices[0].sources) :]
        findings.error(
            "slices-uneven",
            f"modules.{module}.slices" if module else "slices",
            f"{len(slices[0].sources)} in the first, {len(slices[-1].sources)} in the last",
            f"the last slice must not have more sources than the first; mergekit takes {some(after)} from "
            f"{some(models[source.model] for source in taken)} only, without "
            f"{some(models[source.model] for source in left)} and without a word",
            "give the first and the last slice the same number of sources",
        )


def _layers(
    place: str, sources: Sequence[Any], architecture: Any, models: Mapping[ModelReference, Model], findings: Findings
) -> bool:
    good = True
    for source in sources:
        model, (first, end) = models[source.model], source.layer_range
        count = architecture.num_layers(source.model.config())
        if not 0 <= first <= end <= count:
            good = False
            findings.error(
                "layer-range",
                f"{place}.layer_range",
                f"{[first, end]} of {model}",
                f"layer_range must be [first, end) with 0 <= first <= end <= {count}, the model's number of layers",
                f"write a range within [0, {count}]",
            )
    lengths = {models[source.model]: source.layer_range[1] - source.layer_range[0] for source in sources}
    if good and len(set(lengths.values())) > 1:
        good = False
        findings.error(
            "layers-differ",
            place,
            some((f"{count} in {model}" for model, count in lengths.items()), 4),
            "all models must give the same number of layers to a merge",
            "choose models of one depth, or give each a layer_range of the same length under slices",
        )
    return good


@contextmanager
def _loaders(names: Mapping[ModelReference, Mapping[str, object]]) -> Iterator[None]:
    """Let mergekit's planner see these tensor names instead of opening, or downloading, the models."""
    # The cache is global to the process and stale once a checkpoint is written anew, so it is put back as it was.
    with _lock:
        kept = dict(LoaderCache.loaders)
        LoaderCache.loaders.clear()
        for reference, tensors in names.items():
            index = ShardedTensorIndex("", True, dict.fromkeys(tensors, ""), [])
            LoaderCache.loaders[reference] = LazyTensorLoader(index)
        try:
            yield
        finally:
            LoaderCache.loaders.clear()
            LoaderCache.loaders.update(kept)


def named(error: Exception, models: Mapping[ModelReference, Model]) -> str:
    """An error's text, with the models called as the recipe calls them."""
    text = one_line(error) or type(error).__name__
    for stand_in, model in models.items():
        text = text.replace(str(stand_in), str(model))
    return text
