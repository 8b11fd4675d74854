"""The plan of a merge: its output tensors, each with inputs, base, resolved parameters and what mergekit executes.

``Planning`` makes it with mergekit's own planner: from descriptions of models, whose names ``check`` offers to it, or
from the models themselves, which ``opening`` opens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.architecture import ModelArchitecture, WeightInfo
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer
from transformers import PretrainedConfig

from mergekit_select.planner.internals import output_config


def unknown_dtypes(config: MergeConfiguration) -> Iterator[tuple[str, str]]:
    """Yield key and value of a recipe's dtypes that mergekit does not know, or that hold no floating-point numbers."""
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        try:
            dtype = dtype_from_name(name)
        except RuntimeError:
            dtype = None
        if name and (dtype is None or not dtype.is_floating_point):
            yield key, name


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that the merge may write.

    Attributes:
        weight: mergekit's description of it.
        inputs: What is loaded for it: model and mergekit's description there, in recipe order.
        base: The base model at this place.
        shared: Resolved parameters of the whole merge.
        per_input: Resolved parameters of each model.
        stored_name: mergekit's name of the dtype that the result is cast to before it is written; None for as it is.
        task: What mergekit executes.
    """

    weight: WeightInfo
    inputs: tuple[tuple[ModelReference, WeightInfo], ...]
    base: ModelReference | None
    shared: Mapping[str, Any]
    per_input: Mapping[ModelReference, Mapping[str, Any]]
    stored_name: str | None
    task: ExecuteMergeMethodTask

    @property
    def name(self) -> str:
        """Its name in the output."""
        return str(self.weight.name)

    @property
    def stored_as(self) -> torch.dtype | None:
        """The dtype of that name; mergekit raises RuntimeError where it does not know it."""
        dtype: torch.dtype | None = dtype_from_name(self.stored_name)
        return dtype


@dataclass(frozen=True)
class Plan:
    """What mergekit would do.

    Attributes:
        config: The recipe; not modified by planning.
        rewritten: What mergekit's planner makes of it.
        options: The merge's options.
        architecture: mergekit's description of the models.
        out_config: The config.json that the merge writes, but for dtype and the size of an aligned vocabulary.
        tensors: In the order of the architecture.
        failures: Tensors that could not be planned, with the cause.
        tokenizer: What builds the output's tokenizer, where the recipe has mergekit align vocabularies.
    """

    config: MergeConfiguration
    rewritten: MergeConfiguration
    options: MergeOptions
    architecture: ModelArchitecture
    out_config: PretrainedConfig
    tensors: tuple[PlannedTensor, ...]
    failures: tuple[tuple[str, Exception], ...]
    tokenizer: BuildTokenizer | None


class Planning(MergePlanner):
    """mergekit's planner, which goes on after a tensor that fails, and keeps what it planned from.

    Args:
        config: The recipe; mergekit rewrites it, so give a copy.
        architecture: mergekit's description of the models.
        options: The merge's options.
    """

    def __init__(self, config: MergeConfiguration, architecture: ModelArchitecture, options: MergeOptions) -> None:
        settings = output_config(config, architecture, options.trust_remote_code)
        super().__init__(config, architecture, options, settings)
        self._failures: list[tuple[str, Exception]] = []
        self._inputs: list[Sequence[WeightInfo]] = []

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        """Plan one tensor, or keep why not."""
        before = len(self._tensors)
        try:
            super().plan_tensor(weight, weights_in, models, cfg_reader)
        except Exception as error:  # a parameter that the method refuses, or anything else
            self._failures.append((weight.name, error))
            return
        if len(self._tensors) > before:
            self._inputs.append(weights_in)

    def normalise(self) -> None:
        """Rewrite the recipe as modules of slices, with the base model added."""
        self.normalize_config()  # type: ignore[no-untyped-call]  # mergekit has no types

    def plan(self, config: MergeConfiguration, names: Mapping[ModelReference, ModelReference] | None = None) -> Plan:
        """Plan every tensor of a normalised recipe.

        Args:
            config: The recipe that the plan is of.
            names: What the recipe calls a model, by what it was called while planning; left out where that is the same.
        """
        for module, definition in (self.config.modules or {}).items():
            self.plan_module(module, definition)
        called = names or {}
        tensors = []
        for (weight, task), weights_in in zip(self._tensors, self._inputs, strict=True):
            assert isinstance(task, ExecuteMergeMethodTask)
            order = [called.get(model, model) for model in task.model_order]
            tensors.append(
                PlannedTensor(
                    weight=weight,
                    # mergekit pairs the models of the last slice with the number of sources of the first.
                    inputs=tuple(zip(order, weights_in, strict=False)),
                    base=None if task.base_model is None else called.get(task.base_model, task.base_model),
                    shared=dict(task.parameters.items()),
                    per_input={called.get(m, m): dict(values.items()) for m, values in task.input_parameters.items()},
                    stored_name=weight.force_dtype or config.out_dtype,
                    task=task,
                )
            )
        return Plan(
            config=config,
            rewritten=self.config,
            options=self.options,
            architecture=self.arch_info,
            out_config=self.out_model_config,
            tensors=tuple(tensors),
            failures=tuple(self._failures),
            tokenizer=self._tokenizer_task,
        )


def in_execution_order(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """Return the tensors as mergekit executes them: neighbours share a shard, so that none is opened twice.

    To be called where mergekit's cache of open models is that of the plan.
    """
    return sorted(tensors, key=lambda planned: planned.task.group_label() or "")
