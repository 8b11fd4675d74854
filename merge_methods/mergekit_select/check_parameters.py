"""Findings about the parameters that a recipe gives to one tensor, once filters and gradients are resolved."""

from __future__ import annotations

import math
from typing import Any

import torch
from mergekit.merge_methods import MergeMethod, ParameterScope
from pydantic import ValidationError

from mergekit_select.dry_run import dry_run
from mergekit_select.errors import MergekitSelectError
from mergekit_select.findings import GroupedFindings, some
from mergekit_select.models import Model
from mergekit_select.planning import Planned
from mergekit_select.safetensors_header import Tensor

_MOST_DRY_RUNS = 64


class ParameterCheck:
    """Looks at the parameters of one tensor after another.

    Args:
        method: The merge's method.
        problems: Where to add what is wrong.
    """

    def __init__(self, method: MergeMethod, problems: GroupedFindings) -> None:
        self.method = method
        self.problems = problems
        self.dry_runs: dict[tuple[Any, ...], torch.dtype | None] = {}

    def failed(self, tensor: str, error: Exception, text: str) -> None:
        """Add why mergekit could not resolve a tensor's parameters."""
        kind, value = "parameter-invalid", ""
        text = text.replace(f".{tensor}", "").replace(tensor, "the tensor")
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            text = f"the method refuses the value of a parameter: {problem['msg']}"
            value = repr(problem["input"])
        elif text.startswith("Missing required parameter"):
            kind = "parameter-missing"
        elif not isinstance(error, (MergekitSelectError, RuntimeError, ValueError)):
            kind = "plan-failed"
        self.problems.add("error", kind, tensor, value, text, "correct the recipe's parameters")

    def weights(self, planned: Planned, present: list[Model]) -> None:
        """Add weights that are not finite, or that sum to 0 where the method divides by their sum."""
        weights = [
            values["weight"]
            for model in present
            if (values := planned.per_input.get(model)) and isinstance(values.get("weight"), (int, float))
        ]
        for value in weights:
            if not math.isfinite(value):
                message = "a weight must be a finite number; others make the tensor one of NaN"
                self.problems.add("error", "weight-not-finite", planned.name, value, message, "correct the weight")
                return
        own = self.method.spec.name.startswith("parameter_selection")
        if not weights or (sum(weights) != 0 if not own else any(weights)):
            return
        normalises = planned.shared.get("normalize", planned.shared.get("normalize_weights", False))
        if own or (self.method.spec.name in ("linear", "multislerp") and normalises and len(weights) > 1):
            effect = "there is nothing to draw from" if own else "dividing by it makes the tensor one of NaN"
            self.problems.add(
                "error",
                "weights-zero",
                planned.name,
                some(weights, 6),
                f"the weights of a tensor's models must not sum to 0 after filters and gradients; {effect}",
                "give one of them a positive weight there",
            )

    def dry_run(
        self, planned: Planned, entries: list[tuple[Model, Tensor]], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> torch.dtype | None:
        """Merge small random tensors once for each combination of dtype, axes and parameters; return the result's."""
        parameters = dict(planned.shared)
        for parameter in self.method.spec.parameters:
            if parameter.scope is not ParameterScope.SHARED:
                parameters[parameter.name] = [
                    planned.per_input.get(model, {}).get(parameter.name)
                    for model, _ in entries
                    if parameter.scope is ParameterScope.INPUT or model != planned.base
                ]
        kind = (dtype, len(shape), 0 in shape, planned.base is None)
        key = (*kind, repr(sorted(parameters.items())))
        if key in self.dry_runs:
            return self.dry_runs[key]
        if len(self.dry_runs) >= _MOST_DRY_RUNS:  # a gradient has other parameters in every layer
            return next((known for other, known in self.dry_runs.items() if other[:4] == kind), None)
        ids = [model for model, _ in entries]
        problem, self.dry_runs[key] = dry_run(self.method, dtype, shape, ids, planned.base, parameters, planned.name)
        if problem and not any(kind == "weights-zero" for kind, *_ in self.problems.problems):
            name = str(dtype).removeprefix("torch.")
            remedy = "correct the parameters, or set dtype, such as dtype: bfloat16"
            self.problems.add("error", "dry-run", planned.name, name, problem, remedy)
        return self.dry_runs[key]
