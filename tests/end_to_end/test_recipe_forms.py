"""Every form that a recipe can take: models, slices, modules, weights by layer and by name, the base in or out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility import shows
from tests.support import expectation
from tests.support.architectures import WORKING, write_models
from tests.support.expectation import Stored
from tests.support.models import Family, assert_loads
from tests.support.recipes import METHODS, RESAMPLING, SELECTION, Recipe, merge, recipe
from tests.support.stored import read_all, wanted

LAYER = re.compile(r"(?<=model\.layers\.)\d+")
both_methods = pytest.mark.parametrize("method", METHODS)


@shows(
    "Recipe forms", "`models`, the base listed among them or not", note="the base is not drawn where it is base_model"
)
@both_methods
@pytest.mark.parametrize("listed", [False, True])
def test_models_with_the_base_listed_or_not(llamas: Family, tmp_path: Path, method: str, listed: bool) -> None:
    models = [llamas.subs[0], llamas.base, *llamas.subs[1:]] if listed else llamas.subs
    out = merge(recipe(method, llamas.base, models), tmp_path / "out")
    base, *subs = read_all(*llamas.everyone)
    expectation.assert_same(expectation.read(out), wanted(method, base, subs))


@shows(
    "Recipe forms",
    "`models` without `base_model`",
    methods=(SELECTION,),
    note="resampling needs a base and is refused by mergekit without one",
)
def test_models_without_a_base(llamas: Family, tmp_path: Path) -> None:
    out = merge(recipe(SELECTION, None, llamas.everyone), tmp_path / "out")
    expectation.assert_same(expectation.read(out), wanted(SELECTION, {}, read_all(*llamas.everyone)))
    assert_loads(out)


def with_layers(tensors: dict[str, Stored], layers: list[int]) -> dict[str, Stored]:
    """A checkpoint made of the given layers of another."""
    result = {name: tensor for name, tensor in tensors.items() if not LAYER.search(name)}
    for target, layer in enumerate(layers):
        prefix = f"model.layers.{layer}."
        result |= {LAYER.sub(str(target), name): t for name, t in tensors.items() if name.startswith(prefix)}
    return result


def slice_of(*sources: tuple[Path, list[int]]) -> Recipe:
    return {"sources": [{"model": str(model), "layer_range": layers} for model, layers in sources]}


@shows(
    "Recipe forms",
    "`slices`: a frankenmerge with repeated layers",
    note="draws go by the tensor's name in the output, so the copies of a layer have draws of their own",
)
@both_methods
def test_a_frankenmerge(llamas: Family, tmp_path: Path, method: str) -> None:
    everyone = llamas.everyone
    slices = [slice_of(*((m, [0, 2]) for m in everyone)), slice_of(*((m, [1, 3]) for m in everyone))]
    out = merge({"merge_method": method, "base_model": str(llamas.base), "slices": slices}, tmp_path / "out")
    base, *subs = [with_layers(tensors, [0, 1, 1, 2]) for tensors in read_all(*everyone)]
    expectation.assert_same(expectation.read(out), wanted(method, base, subs))
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
    assert_loads(out)


@shows(
    "Recipe forms",
    "`slices` of different layers of the models, of different models, with weights and a seed",
    note="embeddings come from the models of the first slice, norm and head from those of the last",
)
@both_methods
def test_slices_of_different_layers_and_models(llamas: Family, tmp_path: Path, method: str) -> None:
    base, one, two, three = llamas.everyone
    first = slice_of((base, [0, 1]), (one, [0, 1]), (two, [2, 3]))
    second = slice_of((base, [1, 3]), (three, [0, 2]), (one, [1, 3]))
    second["sources"][1]["parameters"] = {"weight": 3}
    config = {"merge_method": method, "base_model": str(base), "slices": [first, second], "parameters": {"seed": 8}}
    out = merge(config, tmp_path / "out")

    tensors = read_all(base, one, two, three)
    early = [with_layers(tensors[k], [layer, 0, 0]) for k, layer in ((0, 0), (1, 0), (2, 2))]
    late = [with_layers(tensors[k], [0, *layers]) for k, layers in ((0, [1, 2]), (3, [0, 1]), (1, [1, 2]))]
    result = wanted(method, late[0], late[1:], seed=8, weights=lambda _name: [3, 1])
    result |= {
        name: tensor
        for name, tensor in wanted(method, early[0], early[1:], seed=8).items()
        if re.match(r"model\.(embed_tokens|layers\.0)\.", name)
    }
    expectation.assert_same(expectation.read(out), result)
    assert_loads(out)


@shows(
    "Recipe forms",
    "`slices`, the last of which has more sources than the first",
    gap=True,
    note="final norm and head: mergekit silently leaves out as many sources of the last slice",
)
def test_mergekit_forgets_sources_of_the_last_slice_for_norm_and_head(llamas: Family, tmp_path: Path) -> None:
    base, one, two, three = llamas.everyone
    heads = {}
    for method in [*METHODS, "linear"]:
        for last in (three, base):
            first = slice_of(*((m, [0, 1]) for m in (base, one, two)))
            second = slice_of(*((m, [1, 3]) for m in (base, one, two, three)))
            if last is base:
                second["sources"].pop()
            config = {"merge_method": method, "base_model": str(base), "slices": [first, second]}
            out = merge(config | {"parameters": {"weight": 1.0}}, tmp_path / f"{method}-{last.name}")
            found = expectation.read(out)
            heads[method, last] = {name: found[name] for name in ("lm_head.weight", "model.norm.weight")}
        expectation.assert_same(heads[method, three], heads[method, base])


@shows("Recipe forms", "`modules` with `slices`")
@both_methods
def test_modules_of_a_model_that_has_one(llamas: Family, tmp_path: Path, method: str) -> None:
    everyone = llamas.everyone
    modules = {"default": {"slices": [slice_of(*((m, [1, 3]) for m in everyone))]}}
    out = merge({"merge_method": method, "base_model": str(llamas.base), "modules": modules}, tmp_path / "out")
    base, *subs = [with_layers(tensors, [1, 2]) for tensors in read_all(*everyone)]
    expectation.assert_same(expectation.read(out), wanted(method, base, subs))
    assert_loads(out)


@shows("Recipe forms", "`modules` with `models`: text decoder and vision tower of different models")
@both_methods
def test_modules_of_a_vision_language_model(tmp_path: Path, method: str) -> None:
    mistral = next(architecture for architecture in WORKING if architecture.title.startswith("Mistral 3"))
    models = write_models(mistral, tmp_path / "family")
    listed = [{"model": str(sub)} for sub in models.subs]
    modules = {
        "text_decoder": {"models": listed},
        "multi_modal_projector": {"models": listed},
        "vision_tower": {"models": listed[:2]},
    }
    config = {"merge_method": method, "base_model": str(models.base), "modules": modules}
    out = merge(config, tmp_path / "out", copy_tokenizer=False)
    base_tensors, *tensors = read_all(*models.everyone)
    result = wanted(method, base_tensors, tensors)
    two = wanted(method, base_tensors, tensors[:2])
    result |= {name: tensor for name, tensor in two.items() if name.startswith("vision_tower.")}
    expectation.assert_same(expectation.read(out), result)


@shows("Recipe forms", "weights by layer (a gradient) and by tensor name (a filter)")
@both_methods
def test_gradients_and_filters(llamas: Family, tmp_path: Path, method: str) -> None:
    parameters: list[Recipe] = [
        {"weight": [1.0, 0.0]},
        {"weight": [{"filter": "mlp", "value": [0.25, 1.0]}, {"filter": "self_attn", "value": 0}, {"value": 2}]},
        {"weight": [0, 1, 0.5]},
    ]
    out = merge(llamas.recipe(method, model_parameters=parameters), tmp_path / "out")

    def weights(name: str) -> list[float]:
        found = LAYER.search(name)
        layer = int(found[0]) if found else 0
        by_name = [0.25, 0.625, 1.0][layer] if "mlp" in name else 0.0 if "self_attn" in name else 2.0
        return [1 - layer / 2, by_name, [0.0, 1.0, 0.5][layer]]

    base, *subs = read_all(*llamas.everyone)
    expectation.assert_same(expectation.read(out), wanted(method, base, subs, weights=weights))


@shows("Recipe forms", "weights of the whole recipe, which a model's own replaces")
@both_methods
def test_weights_of_the_whole_recipe(llamas: Family, tmp_path: Path, method: str) -> None:
    config = llamas.recipe(method, parameters={"weight": [{"filter": "norm", "value": 0.5}]})
    config["models"][1]["parameters"] = {"weight": 4}
    out = merge(config, tmp_path / "out")
    base, *subs = read_all(*llamas.everyone)

    def weights(name: str) -> list[float]:
        others = 0.5 if "norm" in name else 1
        return [others, 4, others]

    expectation.assert_same(expectation.read(out), wanted(method, base, subs, weights=weights))


@shows("Recipe forms", "`rounds`, with unequal weights", methods=(RESAMPLING,))
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds(llamas: Family, tmp_path: Path, rounds: int | None) -> None:
    parameters = [{"weight": weight} for weight in (3, 0, 1)]
    settings: dict[str, Any] = {"rounds": rounds, "seed": 2**62}
    config = llamas.recipe(RESAMPLING, model_parameters=parameters, parameters=settings)
    base, *subs = read_all(*llamas.everyone)
    expected = wanted(RESAMPLING, base, subs, weights=lambda _name: [3, 0, 1], **settings)
    expectation.assert_same(expectation.read(merge(config, tmp_path / "out")), expected)
