"""Several processes give the answers of one, whatever becomes of the helpers."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_select.bits import digest
from mergekit_select.errors import PlanError
from mergekit_select.inputs.processors import cores
from mergekit_select.inspection import inspect
from mergekit_select.planner.engine import Engine
from mergekit_select.planner.opening import opened
from mergekit_select.planner.plan import PlannedTensor
from mergekit_select.planner.together import each
from mergekit_select.verification import verify
from tests.support.checkpoints import changed
from tests.support.models import Family
from tests.support.recipes import RESAMPLING, merge


def answered(engine: Engine, planned: PlannedTensor, *, home: int, dies: bool) -> tuple[str, bool]:
    """Return a tensor's digest, and whether a helper computed it; or let the helper die."""
    helps = os.getpid() != home
    if helps and dies:
        os._exit(9)
    result = engine.merged(planned)
    assert result is not None
    return digest(result), helps


def refused(_engine: Engine, planned: PlannedTensor, *, home: int) -> None:
    if os.getpid() != home:
        raise PlanError(f"{planned.name} cannot be merged")


def answers(recipe: dict[str, Any], jobs: int, answer: Any) -> tuple[dict[str, Any], list[str]]:
    config, options, told = MergeConfiguration.model_validate(recipe), MergeOptions(), list[str]()

    def progress(tensors: Any) -> Any:
        for planned in tensors:
            yield planned
            told.append(planned.name)

    with opened(config, options) as engine:
        found = {p.name: value for p, value in each(engine, config, options, answer, jobs=jobs, progress=progress)}
        assert [*found] == [planned.name for planned in engine.tensors]
    return found, told


def test_each_tensor_once_by_whom_ever(llamas: Family) -> None:
    alone, _ = answers(llamas.recipe(), 1, partial(answered, home=os.getpid(), dies=False))
    together, told = answers(llamas.recipe(), 2, partial(answered, home=os.getpid(), dies=False))
    assert {name: value for name, (value, _) in together.items()} == {name: value for name, (value, _) in alone.items()}
    assert {helped for _, helped in together.values()} == {True, False}
    assert sorted(told) == sorted(alone)


def test_the_number_of_threads_is_as_before(llamas: Family) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(cores() + 1)
    try:
        answers(llamas.recipe(), 2, partial(answered, home=os.getpid(), dies=False))
        assert torch.get_num_threads() == cores() + 1
    finally:
        torch.set_num_threads(before)


def test_what_a_dead_helper_leaves_is_done(llamas: Family) -> None:
    alone, _ = answers(llamas.recipe(), 1, partial(answered, home=os.getpid(), dies=False))
    together, _ = answers(llamas.recipe(), 2, partial(answered, home=os.getpid(), dies=True))
    assert together == alone


def test_a_refusal_of_a_helper_is_a_refusal(llamas: Family) -> None:
    with pytest.raises(PlanError, match="cannot be merged"):
        answers(llamas.recipe(), 2, partial(refused, home=os.getpid()))


def test_methods_whose_tensors_depend_on_each_other_stay_in_one_process(llamas: Family) -> None:
    recipe = llamas.recipe("dare_ties", parameters={"density": 0.5, "weight": 1.0})
    found, _ = answers(recipe, 2, partial(answered, home=os.getpid(), dies=True))
    assert not any(helped for _, helped in found.values())


def test_verify_and_inspect_say_the_same(llamas: Family, tmp_path: Path) -> None:
    out = merge(llamas.recipe(RESAMPLING), tmp_path / "out")
    changed(out, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert verify(out, jobs=2) == verify(out)
    assert not verify(out, jobs=2).same
    config = MergeConfiguration.model_validate(llamas.recipe(RESAMPLING))
    assert inspect(config, jobs=2) == inspect(config)
