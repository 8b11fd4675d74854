"""``verify`` finds models that lie elsewhere than the recipe says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_select.inputs.recipe import read_recipe
from mergekit_select.inputs.references import matches, references, relocated
from tests.support.commands import invoke
from tests.support.models import Family, small_family
from tests.support.recipes import merge


def test_moved_models(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    out = merge(family.recipe(), tmp_path / "out")
    moved = Family(family.root.rename(tmp_path / "elsewhere"))
    assert invoke("verify", out).exit_code == 2
    assert invoke("verify", out, "--map", f"{family.root}={moved.root}").exit_code == 0
    one_by_one = [
        f"--map={old}={new}" for old, new in zip([family.base, *family.subs], [moved.base, *moved.subs], strict=True)
    ]
    assert invoke("verify", out, *one_by_one).exit_code == 0
    (a, b, _), (moved_a, moved_b, _) = family.subs, moved.subs
    swapped = [f"--map={family.root}={moved.root}", f"--map={a}={moved_b}", f"--map={b}={moved_a}"]
    assert invoke("verify", out, *swapped).exit_code == 1


@pytest.mark.parametrize(
    ("reference", "location", "expected"),
    [
        ("o/x", "o/x", True),
        ("o/x@v1", "o/x", True),
        ("o/x@v1", "o/x@v1", True),
        ("o/x", "o/x@v1", False),
        ("o/x", "o", True),
        ("o/x-2", "o/x", False),
        ("./runs/a", "./runs/", True),
    ],
)
def test_which_models_a_location_is_of(reference: str, location: str, expected: bool) -> None:
    assert matches(reference, location) == expected


def test_every_place_that_names_a_model() -> None:
    text = (
        "merge_method: linear\nbase_model: o/x@v1\ndtype: float32\n"
        "slices: [{base_model: o/x, sources: [{model: o/x+o/lora, layer_range: [0, 2]}]}]\n"
        "tokenizer: {source: o/x, tokens: {t: {source: o/x}}}\n"
    )
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    moved = relocated(config, {"o/x": "/n", "o/lora": "/l"}).model_dump(mode="json")
    assert "o/x" not in json.dumps(moved)
    assert moved["slices"][0]["sources"][0]["model"] == "/n+/l"
    assert str(config.base_model) == "o/x@v1"
    assert str(relocated(config, {"o": "/hub"}).base_model) == "/hub/x@v1"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("nonsense", "must be OLD=NEW, got 'nonsense'"),
        ("=x", "must be OLD=NEW"),
        ("./no=./where", "--map must name a model of the recipe, got './no'"),
        ("{model}=/x@y@z", "lies now, a folder or OWNER/NAME@REVISION, got '/x@y@z'"),
    ],
)
def test_map_that_fits_nothing(merged: Path, value: str, text: str) -> None:
    model = next(model for _, model in references(read_recipe(merged / "mergekit_config.yml")))
    result = invoke("verify", merged, "--map", value.format(model=model))
    assert result.exit_code == 2
    assert text in result.output
