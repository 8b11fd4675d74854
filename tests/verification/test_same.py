"""``verify`` says that an output is the same where it is, in every form that an output has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_select.verification import verify
from tests.support.checkpoints import VOCABULARY, changed, in_dtype, tensors_of
from tests.support.commands import invoke, run
from tests.support.models import small_family
from tests.support.recipes import RESAMPLING, SELECTION, layers_of, merge, written
from tests.verification.support import PARAMETERS, TENSORS


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({}, {}),
        ({"parameters": {"rounds": 1, "seed": 5}}, {}),
        ({"merge_method": SELECTION}, {}),
        ({"merge_method": "linear", "parameters": {"weight": 1}}, {}),
        ({"merge_method": "ties", "parameters": {"weight": 1, "density": 0.5}}, {}),
        ({"merge_method": "model_stock"}, {}),
        ({"merge_method": "sce"}, {}),
        ({"dtype": "float32"}, {}),
        ({"out_dtype": "float16"}, {}),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, {"out_shard_size": 8_000}),
        ({}, {"safe_serialization": False}),
        ({}, {"safe_serialization": False, "out_shard_size": 8_000}),
    ],
    ids=str,
)
def test_finished_output(keys: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**small_family().recipe(), **keys}
    answer = verify(merge(recipe, tmp_path / "out", **options))
    assert answer.same, answer
    assert (answer.tensors, answer.parameters) == (TENSORS, PARAMETERS)
    assert answer.notes == ()


@pytest.mark.parametrize("out_dtype", [{}, {"out_dtype": "float16"}], ids=str)
def test_tied_weights(tmp_path: Path, out_dtype: dict[str, str]) -> None:
    recipe = small_family(tied=True).recipe(**out_dtype)
    answer = verify(merge(recipe, tmp_path / "out"))
    assert answer.same
    assert answer.tensors == TENSORS - 1


def test_aligned_tokenizers(tmp_path: Path) -> None:
    family = small_family(rotated=True)
    aligned = merge(family.recipe(tokenizer={"source": "base"}), tmp_path / "aligned")
    answer = verify(aligned)
    assert answer.same
    plain = merge(family.recipe(), tmp_path / "plain")
    other = verify(aligned, plain / "mergekit_config.yml")
    assert {difference.tensor for difference in other.differences} == set(VOCABULARY)


def test_mixed_dtypes_promote(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    changed(family.subs[2], in_dtype(torch.float32))
    out = merge(family.recipe(), tmp_path / "out")
    assert verify(out).same
    assert {value.dtype for value in tensors_of(out).values()} == {torch.float32}


def test_slices_of_different_layers(tmp_path: Path) -> None:
    family = small_family()
    models = [family.base, *family.subs[:2]]
    slices = [layers_of(0, 2, *models), layers_of(1, 2, *models)]
    recipe = {"merge_method": RESAMPLING, "base_model": str(family.base), "slices": slices}
    out = merge(recipe, tmp_path / "out")
    answer = verify(out)
    assert answer.same
    assert answer.tensors == TENSORS + 9


def test_recipe_that_mergekit_multi_stored(tmp_path: Path) -> None:
    family = small_family()
    first = {"name": "first", **family.recipe()}
    second = {**family.recipe(SELECTION), "name": "second"}
    second["models"] = [{"model": "first"}, {"model": str(family.subs[2]), "parameters": {"weight": [1, 2]}}]
    written(tmp_path / "multi.yml", first, second)
    done = run("mergekit-multi", "multi.yml", "-I", "./merges", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stored = yaml.safe_load((tmp_path / "merges/first/mergekit_config.yml").read_text())
    assert "slices" in stored["modules"]["default"]
    assert verify(tmp_path / "merges/first").same
    # Its recipe names ./merges/first, which begins at the folder that mergekit-multi ran in.
    answer = verify(tmp_path / "merges/second", locations={"./merges/first": str(tmp_path / "merges/first")})
    assert answer.same
    assert invoke("verify", tmp_path / "multi.yml").exit_code == 2
    result = invoke("verify", tmp_path / "merges/first", "--recipe", tmp_path / "multi.yml")
    assert result.exit_code == 2
    assert "must hold one merge, and holds 2" in result.output
