"""``inspect`` compares the sub-models with the base and with each other; how it names layers and modules."""

from __future__ import annotations

from functools import reduce
from itertools import combinations
from operator import add
from pathlib import Path

import pytest
import torch

from mergekit_select.bits import integers
from mergekit_select.inspection.inspect import place
from tests.inspection.support import PARAMETERS, inspected, places, ran, same
from tests.support.checkpoints import changed, copied, in_dtype, tensors_of
from tests.support.models import small_family
from tests.support.recipes import SELECTION


def test_norms_agreement_and_what_no_sub_model_changed() -> None:
    family = small_family()
    base = tensors_of(family.base)
    inputs = [tensors_of(sub) for sub in family.subs]
    for tally, names in places(inspected(family.recipe())):
        for k, tensors in enumerate(inputs):
            square = sum(((tensors[n].double() - base[n].double()) ** 2).sum().item() for n in names)
            assert tally.norms[k] == pytest.approx(square**0.5, rel=1e-12)
            origin = sum((base[n].double() ** 2).sum().item() for n in names)
            assert tally.relative_norms[k] == pytest.approx((square / origin) ** 0.5, rel=1e-12)
        for pair, (i, j) in enumerate(combinations(range(3), 2)):
            assert tally.pairs_agreeing[pair] == sum(same(inputs[i][n], inputs[j][n]) for n in names)
        everywhere = 0
        for name in names:
            equal = torch.ones(base[name].shape, dtype=torch.bool)
            for tensors in inputs:
                equal &= integers(tensors[name]) == integers(base[name])
            everywhere += int(equal.sum())
        assert tally.unchanged_all == everywhere


def test_identical_sub_models_are_said_to_be_identical(tmp_path: Path) -> None:
    family = small_family()
    recipe = family.recipe(SELECTION)
    assert "are identical" not in ran(recipe, tmp_path).output
    twins = [copied(family.subs[0], tmp_path / name) for name in ("second", "third")]
    recipe["models"] = [{"model": str(folder)} for folder in (family.subs[0], twins[0], family.subs[1], twins[1])]
    said = [line for line in ran(recipe, tmp_path).output.splitlines() if "are identical" in line]
    why = "are identical: the runs did not differ; see docs/training.md"
    assert said == [f"sub-models 1 and 2 {why}", f"sub-models 1 and 4 {why}"]


@pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
def test_other_methods(method: str, tmp_path: Path) -> None:
    family = small_family()
    recipe = family.recipe(method, parameters={"weight": 1})
    if method == "passthrough":
        recipe = {"merge_method": method, "models": [{"model": str(family.subs[0])}]}
    answer = inspected(recipe)
    assert (answer.draws, answer.seed, answer.total.drawn) == (False, None, 0)
    assert answer.total.parameters == PARAMETERS
    if method != "passthrough":
        assert answer.total.unchanged == inspected(family.recipe()).total.unchanged
    output = ran(recipe, tmp_path).output
    assert "chosen" not in output
    assert ("unchanged" in output) == (method != "passthrough")


def test_without_a_base(tmp_path: Path) -> None:
    recipe = small_family().recipe(SELECTION)
    del recipe["base_model"]
    answer = inspected(recipe)
    assert answer.bases == ()
    assert answer.total.unchanged_shares == answer.total.norms == (None, None, None)
    result = ran(recipe, tmp_path)
    assert "base none" in result.output
    assert "unchanged" not in result.output
    assert "chosen" in result.output
    assert ran(recipe, tmp_path, "--json").exit_code == 0


def test_mixed_dtypes_are_compared_as_they_are_merged(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    before = inspected(family.recipe()).total
    for folder in (family.base, family.subs[2]):
        changed(folder, in_dtype(torch.float32))
    assert inspected(family.recipe()).total == before


def test_more_sub_models_than_are_compared_pairwise(tmp_path: Path) -> None:
    family = small_family()
    copies = [copied(family.subs[number % 3], tmp_path / f"m{number}") for number in range(17)]
    recipe = {**family.recipe(), "models": [{"model": str(copy)} for copy in copies]}
    answer = inspected(recipe)
    assert answer.total.pairs_held == ()
    assert sum(answer.total.first) == PARAMETERS
    lines = ran(recipe, tmp_path).output.splitlines()
    assert max(map(len, lines)) <= 100


def test_tallies_add_up() -> None:
    answer = inspected(small_family().recipe())
    total = answer.total
    for parts in ([tensor.tally for tensor in answer.tensors], list(answer.layers.values())):
        found = reduce(add, parts)
        assert (found.tensors, found.parameters, found.drawn) == (total.tensors, total.parameters, total.drawn)
        assert (found.first, found.redrawn) == (total.first, total.redrawn)
        assert (found.chosen, found.left) == (total.chosen, total.left)
    assert (total + total).first == tuple(2 * count for count in total.first)


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "model.layers.12", "self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj.bias", "model.layers.0", "self_attn.q_proj.bias"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", "model.layers.3", "mlp.experts.*.up_proj"),
        ("h.7.attn.c_attn.weight", "h.7", "attn.c_attn"),
        ("0.weight", "0", "weight"),
        ("bert.encoder.layer.1.attention.self.query.weight", "bert.encoder.layer.1", "attention.self.query"),
        ("model.embed_tokens.weight", None, "embed_tokens"),
        ("model.norm.weight", None, "norm"),
        ("lm_head.weight", None, "lm_head"),
        ("weight", None, "weight"),
    ],
)
def test_place(name: str, layer: str | None, module: str) -> None:
    assert place(name) == (layer, module)
