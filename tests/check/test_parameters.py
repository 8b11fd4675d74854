"""``check`` on the values of parameters, and on what they are for each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mergekit_select.findings import Severity
from tests.check.cases import Case, Cases, checked, only
from tests.support.checkpoints import (
    tensors_of,
)
from tests.support.models import Family
from tests.support.recipes import RESAMPLING, SELECTION, recipe

CASES = Cases()


def not_finite(out: Path) -> bool:
    return any(not torch.isfinite(tensor.float()).all() for tensor in tensors_of(out).values())


@CASES.add("parameter-invalid")
def negative_weight(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(SELECTION, None, llamas.subs, parameters={"weight": -1}))


@CASES.add("parameter-invalid")
def list_of_seeds(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(SELECTION, None, llamas.subs, parameters={"seed": [1, 2]}))


@CASES.add("parameter-invalid")
def no_rounds(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(RESAMPLING, llamas.base, llamas.subs, parameters={"rounds": 0}))


@CASES.add("weight-not-finite")
def infinite_weight(llamas: Family, tmp: Path) -> Case:
    config = recipe("linear", None, llamas.subs, parameters={"weight": float("inf")})
    return Case(config, not_finite)


@CASES.add("weights-zero")
def all_weights_zero_in_one_layer(llamas: Family, tmp: Path) -> Case:
    weight = [{"filter": "layers.1.mlp", "value": 0}, {"value": 1}]
    return Case(recipe(SELECTION, llamas.base, llamas.subs, parameters={"weight": weight}))


@CASES.add("weights-zero")
def gradient_that_starts_at_zero(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(RESAMPLING, llamas.base, llamas.subs, parameters={"weight": [0, 1]}))


@CASES.add("weights-zero")
def linear_weights_that_cancel(llamas: Family, tmp: Path) -> Case:
    config = recipe("linear", None, llamas.subs[:2], model_parameters=[{"weight": 1}, {"weight": -1}])
    return Case(config, not_finite)


def test_a_parameter_given_to_the_base_is_ignored(llamas: Family, tmp_path: Path) -> None:
    config = recipe(SELECTION, llamas.base, [llamas.base, *llamas.subs], model_parameters=[{"weight": 2}, {}, {}, {}])
    finding = only(checked(tmp_path, config), "base-parameter-ignored")
    assert str(finding) == (
        "warning base-parameter-ignored at models[0].parameters.weight: mergekit ignores weight for the base model "
        "(got 2); remove it"
    )


def test_multislerp_depends_on_values(llamas: Family, tmp_path: Path) -> None:
    report = checked(tmp_path, recipe("multislerp", llamas.base, llamas.subs, parameters={"weight": 1}))
    assert only(report, "not-known").severity is Severity.NOTE


@CASES.add("parameter-invalid")
def weight_that_is_a_truth_value(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(SELECTION, None, llamas.subs, parameters={"weight": True}))


def test_filters_that_no_tensor_meets(llamas: Family, tmp_path: Path) -> None:
    def found(*weight: dict[str, Any]) -> list[tuple[str, str]]:
        config = recipe(SELECTION, llamas.base, llamas.subs, model_parameters=[{"weight": [*weight]}, {}, {}])
        report = checked(tmp_path, config)
        return [(one.place, one.value) for one in report.findings if one.kind == "filter-unused"]

    pattern, part, rest = {"filter": "*.self_attn.*", "value": 0}, {"filter": "self_attn", "value": 0}, {"value": 1}
    assert found(part, rest) == found(rest) == []
    assert found(pattern, rest) == [("models[0].parameters.weight[0].filter", "*.self_attn.*")]
    assert found(rest, part) == [("models[0].parameters.weight[1]", "self_attn")]
