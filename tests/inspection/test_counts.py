"""``inspect`` counts what a merge takes: every count is counted again in the merged output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_select.bits import integers
from tests.inspection.support import inspected, places, ran, same
from tests.support.checkpoints import edit_json, save, tensors_of
from tests.support.models import Family, small_family
from tests.support.recipes import SELECTION, merge


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"seed": 7},
        {"weight": [{"filter": "self_attn", "value": 2}, {"value": [1, 3]}]},
    ],
    ids=str,
)
def test_selection(moved: Family, tmp_path: Path, parameters: dict[str, Any]) -> None:
    models = [{"model": str(sub)} for sub in moved.subs]
    models[1]["parameters"] = parameters  # type: ignore[assignment]
    recipe = {"merge_method": SELECTION, "models": models, "parameters": {}}
    if "seed" in parameters:
        recipe["parameters"] = models[1].pop("parameters")
    merged = tensors_of(merge(recipe, tmp_path / "out"))
    inputs = [tensors_of(sub) for sub in moved.subs]
    answer = inspected(recipe)
    assert (answer.draws, answer.resamples, answer.seed) == (True, False, parameters.get("seed", 0))
    for tally, names in places(answer):
        counts = tuple(sum(same(merged[name], tensors[name]) for name in names) for tensors in inputs)
        assert tally.chosen == tally.first == counts
        assert sum(counts) == tally.parameters == tally.drawn
        assert (tally.left, tally.redrawn) == (0, (0, 0, 0))


@pytest.mark.parametrize("rounds", [None, 1, 2])
def test_resampling(distinct: Family, tmp_path: Path, rounds: int | None) -> None:
    parameters = {"seed": 3} if rounds is None else {"seed": 3, "rounds": rounds}
    recipe = distinct.recipe(parameters=parameters)
    merged = tensors_of(merge(recipe, tmp_path / "out"))
    first = distinct.recipe(SELECTION, parameters={"seed": 3})
    selected = tensors_of(merge(first, tmp_path / "first"))
    base = tensors_of(distinct.base)
    inputs = [tensors_of(sub) for sub in distinct.subs]
    answer = inspected(recipe)
    assert (answer.resamples, answer.rounds) == (True, rounds)
    for tally, names in places(answer):
        for k, tensors in enumerate(inputs):
            changed = {name: integers(tensors[name]) != integers(base[name]) for name in names}
            assert tally.unchanged[k] == sum(int((~changed[name]).sum()) for name in names)
            assert tally.chosen[k] == sum(
                same(merged[name][changed[name]], tensors[name][changed[name]]) for name in names
            )
        assert tally.left == sum(same(merged[name], base[name]) for name in names)
        assert sum(tally.redrawn) == sum(same(selected[name], base[name]) for name in names)
        assert sum(tally.first) == sum(tally.chosen) + tally.left == tally.drawn
    assert answer.total.first == inspected(first).total.first


def test_aligned_vocabulary(tmp_path: Path) -> None:
    family = small_family(torch.float32, rotated=True)
    recipe = family.recipe(tokenizer={"source": "base"})
    merged = tensors_of(merge(recipe, tmp_path / "out"))
    answer = inspected(recipe)
    name = "model.embed_tokens.weight"
    (tally,) = (tensor.tally for tensor in answer.tensors if tensor.name == name)
    # Each sub-model's tokens are rotated against the base's, so that hardly a row stays where it was.
    assert sum(tally.unchanged) < sum(
        tensor.tally.unchanged[k]
        for k in range(3)
        for tensor in inspected(family.recipe()).tensors
        if tensor.name == name
    )
    base = tensors_of(family.base)[name]
    assert tally.left == same(merged[name], base[: len(merged[name])])


def test_slices_that_list_the_models_in_another_order(moved: Family, tmp_path: Path) -> None:
    def part(names: str, layers: list[int], weights: list[int]) -> dict[str, Any]:
        sources = [
            {"model": str(moved.root / name), "layer_range": layers, "parameters": {"weight": weight}}
            for name, weight in zip(names, weights, strict=True)
        ]
        return {"sources": sources}

    slices = [part("ab", [0, 1], [1, 3]), part("cba", [1, 2], [1, 2, 5])]
    recipe = {"merge_method": SELECTION, "slices": slices}
    merged = tensors_of(merge(recipe, tmp_path / "out"))
    answer = inspected(recipe)
    names = [Path(model).name for model in answer.models]
    assert sorted(names) == ["a", "b", "c"]
    for tensor in answer.tensors:
        counts = [same(merged[tensor.name], tensors_of(moved.root / name)[tensor.name]) for name in names]
        assert tensor.tally.chosen == tuple(counts)
    second = answer.layers["model.layers.1"]
    shares = dict(zip(names, (value / second.drawn for value in second.expected), strict=True))
    assert shares == pytest.approx({"a": 5 / 8, "b": 2 / 8, "c": 1 / 8})
    deviations = [value for value in answer.total.deviations if value is not None]
    assert max(map(abs, deviations)) < 4


def test_tensor_that_one_model_has(moved: Family, tmp_path: Path) -> None:
    """In an architecture that mergekit infers, a tensor may be missing somewhere."""
    family = moved.copied(tmp_path / "models")
    for name in ("base", "a", "b", "c"):
        edit_json(family.root / name / "config.json", architectures=["NobodyKnowsForCausalLM"])
    for name in "ab":
        tensors = tensors_of(family.root / name)
        del tensors["model.norm.weight"]
        if name == "a":
            del tensors["model.layers.1.mlp.up_proj.weight"]
        save(family.root / name, tensors)
    recipe = {
        "merge_method": SELECTION,
        "models": [{"model": str(sub)} for sub in family.subs],
    }
    merged = tensors_of(merge(recipe, tmp_path / "out"))
    tallies = {tensor.name: tensor.tally for tensor in inspected(recipe).tensors}
    assert tallies.keys() == merged.keys()
    norm = tallies["model.norm.weight"]
    assert (norm.drawn, norm.held, norm.chosen) == (0, (0, 0, 32), (0, 0, 0))
    projection = tallies["model.layers.1.mlp.up_proj.weight"]
    assert (projection.held, projection.drawn) == ((0, 1536, 1536), 1536)
    for k, name in enumerate("abc"):
        held = tensors_of(family.root / name).get("model.layers.1.mlp.up_proj.weight")
        counted = 0 if held is None else same(held, merged["model.layers.1.mlp.up_proj.weight"])
        assert projection.chosen[k] == counted
    assert "copied without a draw: 32 parameters" in ran(recipe, tmp_path).output
