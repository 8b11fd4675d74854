"""``inspect`` says in one line what it cannot read, or which merge would fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_select.errors import MergekitSelectError, ParameterError
from tests.inspection.support import inspected, ran
from tests.support.checkpoints import save, tensors_of
from tests.support.commands import invoke, one_line
from tests.support.models import small_family


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"\x00\x01\xff", "must be UTF-8 text"),
        (b"a: [", "must be YAML"),
        (b"7", "must be a YAML mapping"),
        (b"merge_method: linear", "mergekit refuses the recipe"),
        (b"a: 1\n---\nb: 2\n", "must say merge_method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recipe(tmp_path: Path, content: bytes, text: str) -> None:
    one_line(ran(content, tmp_path), 2, text)


def test_no_recipe(tmp_path: Path) -> None:
    one_line(invoke("inspect", tmp_path / "none.yml"), 2, "No such file or directory")


def test_models_that_are_missing_or_damaged(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    recipe = family.recipe()
    path = family.subs[1] / "model.safetensors"
    content = path.read_bytes()
    for damaged in (b"", content[:-1], (1 << 50).to_bytes(8, "little") + content[8:]):
        path.write_bytes(damaged)
        one_line(ran(recipe, tmp_path), 2, str(path))
    path.unlink()
    one_line(ran(recipe, tmp_path), 2, str(family.subs[1]))
    (family.subs[1] / "config.json").write_text("{")
    one_line(ran(recipe, tmp_path), 2, str(family.subs[1]))
    with pytest.raises(MergekitSelectError):
        inspected({**recipe, "models": [{"model": str(tmp_path / "gone")}]})


def test_recipe_that_does_not_merge(tmp_path: Path) -> None:
    recipe = small_family().recipe()
    one_line(ran({**recipe, "merge_method": "nonsense"}, tmp_path), 1, "Unimplemented merge method")
    one_line(ran({**recipe, "parameters": {"rounds": 0}}, tmp_path), 1, "rounds must be an integer")
    del recipe["base_model"]
    one_line(ran(recipe, tmp_path), 1, "requires a base")


def test_weights_that_are_all_0_for_some_tensor(tmp_path: Path) -> None:
    recipe = small_family().recipe()
    recipe["parameters"] = {"weight": [{"filter": "layers.1.mlp.up_proj", "value": 0}, {"value": 1}]}
    one_line(ran(recipe, tmp_path), 1, "tensor 'model.layers.1.mlp.up_proj.weight': the weights")
    with pytest.raises(ParameterError):
        inspected(recipe)


def test_shapes_that_differ(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    tensors = tensors_of(family.subs[2])
    tensors["model.norm.weight"] = torch.zeros(33, dtype=torch.bfloat16)
    save(family.subs[2], tensors)
    one_line(ran(family.recipe(), tmp_path), 1, "size mismatch for model.norm.weight")
