"""Check the parameters of one tensor after another, once filters and gradients are resolved."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.merge_methods import MergeMethod, ParameterScope, TensorEntry, TensorGroup, TensorMetadata
from pydantic import ValidationError

from mergekit_select import kinds
from mergekit_select.bits import dtype_name
from mergekit_select.errors import MergekitSelectError, one_line, place_and_rule
from mergekit_select.findings import Findings, TensorFindings, some
from mergekit_select.inputs.references import parts
from mergekit_select.methods import OWN
from mergekit_select.planner.plan import PlannedTensor

_MOST_DRY_RUNS = 64  # a gradient gives every layer parameters of its own
_SIDE = 8  # elements of a dry run along each axis at most; enough for sparsification and norms


class ParameterCheck:
    """Looks at the parameters of one tensor after another.

    Args:
        method: The merge's method.
        findings: Where to add what is wrong.
    """

    def __init__(self, method: MergeMethod, findings: TensorFindings) -> None:
        self.method = method
        self.findings = findings
        self._dry_runs: dict[tuple[Any, ...], torch.dtype | None] = {}

    def failed(self, tensor: str, error: Exception, text: str) -> None:
        """Add why mergekit could not resolve a tensor's parameters.

        Args:
            tensor: The tensor's name.
            error: What mergekit raised.
            text: Its text, with the models called as the recipe calls them.
        """
        text = text.replace(f".{tensor}", "").replace(tensor, "the tensor")
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            _, rule = place_and_rule(problem)
            self.findings.add(kinds.PARAMETER_INVALID, tensor, repr(problem["input"]), problem=rule)
            return
        kind = kinds.PARAMETERS_REFUSED
        if str(error).startswith("Missing required parameter"):
            kind = kinds.PARAMETER_MISSING
        elif not isinstance(error, (MergekitSelectError, RuntimeError, ValueError)):
            kind = kinds.TENSOR_NOT_PLANNED
        self.findings.add(kind, tensor, problem=text)

    def weights(self, planned: PlannedTensor, present: Sequence[ModelReference]) -> None:
        """Add weights that are not finite, or that sum to 0 where the method divides by their sum."""
        weights = [
            values["weight"]
            for model in present
            if (values := planned.per_input.get(model)) and isinstance(values.get("weight"), (int, float))
        ]
        for value in weights:
            if not math.isfinite(value):
                self.findings.add(kinds.WEIGHT_NOT_FINITE, planned.name, value)
                return
        own = self.method.spec.name in OWN
        if not weights or (any(weights) if own else sum(weights) != 0):
            return
        normalises = planned.shared.get("normalize", planned.shared.get("normalize_weights", False))
        if own or (self.method.spec.name in ("linear", "multislerp") and normalises and len(weights) > 1):
            effect = "there is nothing to draw from" if own else "dividing by it fills the tensor with NaN"
            self.findings.add(kinds.WEIGHTS_ZERO, planned.name, some(weights, 6), effect=effect)

    def dry_run(
        self, planned: PlannedTensor, models: Sequence[ModelReference], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> torch.dtype | None:
        """Merge small random tensors once for each combination of dtype, axes and parameters; return the result's."""
        parameters = dict(planned.shared)
        for parameter in self.method.spec.parameters:
            if parameter.scope is not ParameterScope.SHARED:
                parameters[parameter.name] = [
                    planned.per_input.get(model, {}).get(parameter.name)
                    for model in models
                    if parameter.scope is ParameterScope.INPUT or model != planned.base
                ]
        alike = (dtype, len(shape), 0 in shape, planned.base is None)
        key = (*alike, repr(sorted(parameters.items())))
        if key in self._dry_runs:
            return self._dry_runs[key]
        if len(self._dry_runs) >= _MOST_DRY_RUNS:
            return next((known for other, known in self._dry_runs.items() if other[:4] == alike), None)
        problem, self._dry_runs[key] = _run(self.method, planned, models, dtype, shape, parameters)
        if problem and not self.findings.has(kinds.WEIGHTS_ZERO):
            self.findings.add(kinds.DRY_RUN, planned.name, dtype_name(dtype), problem=problem)
        return self._dry_runs[key]


def check_filters(config: MergeConfiguration, names: Collection[str], findings: Findings) -> None:
    """Add filters that no tensor meets: they match no name, or stand behind an entry without a filter."""
    for place, entries in parts(config, _has_filters):
        decided = False
        for number, entry in enumerate(entries):
            here = f"{place}[{number}]"
            if decided:
                findings.add(kinds.FILTER_UNREACHED, here, entry.filter or entry.value)
            elif entry.filter in (None, "*"):
                decided = True
            elif not any(entry.filter in name for name in names):
                findings.add(kinds.FILTER_UNUSED, f"{here}.filter", entry.filter)


def _has_filters(part: object) -> bool:
    return isinstance(part, list) and bool(part) and all(isinstance(entry, ConditionalParameter) for entry in part)


def _run(
    method: MergeMethod,
    planned: PlannedTensor,
    models: Sequence[ModelReference],
    dtype: torch.dtype,
    shape: Sequence[int],
    parameters: Mapping[str, Any],
) -> tuple[str, torch.dtype | None]:
    """Return why the method fails on small random tensors, or an empty string, and the dtype of its result."""
    generator = torch.Generator().manual_seed(0)
    small = [min(length, _SIDE) for length in shape]
    entries = tuple(
        TensorEntry(model, torch.randn(small, generator=generator).to(dtype), is_base=model == planned.base)
        for model in models
    )
    group = TensorGroup(entries, TensorMetadata(name=planned.name))
    try:
        # Some methods draw from torch's global generator, which is the caller's.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            (result,) = method((group,), parameters=parameters)
    except Exception as error:  # whatever a method raises
        problem = f"{method.spec.name} fails on tensors of these dtypes with these parameters: {one_line(error)}"
        return problem, None
    if result.is_floating_point() and not bool(torch.isfinite(result.float()).all()):
        problem = f"{method.spec.name} makes NaN or infinite values of finite ones with these parameters"
        return problem, result.dtype
    return "", result.dtype
