"""``check`` on what the recipe itself says: keys, methods, parameters, dtypes, number of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mergekit_select.check import check
from mergekit_select.findings import Severity
from tests.check.cases import Case, Cases, checked, kinds, only
from tests.support.checkpoints import (
    copied,
    digests,
    tensors_of,
)
from tests.support.models import Family
from tests.support.recipes import RESAMPLING, SELECTION, merge, recipe

CASES = Cases()


@CASES.add("recipe-invalid")
def both_models_and_slices(llamas: Family, tmp: Path) -> Case:
    config = recipe(SELECTION, llamas.base, llamas.subs)
    slices = [{"sources": [{"model": str(llamas.base), "layer_range": [0, 3]}]}]
    return Case({**config, "slices": slices})


@CASES.add("recipe-invalid")
def no_models(llamas: Family, tmp: Path) -> Case:
    return Case({"merge_method": "linear"})


@CASES.add("unknown-key")
def misspelt_parameter(llamas: Family, tmp: Path) -> Case:
    good = recipe(SELECTION, llamas.base, llamas.subs)
    merge(good, tmp / "plain")
    config = {**good, "parameters": {"sede": 7}}
    return Case(config, lambda out: digests(out) == digests(tmp / "plain"))


@CASES.add("unknown-key")
def seed_given_to_one_model(llamas: Family, tmp: Path) -> Case:
    merge(recipe(SELECTION, llamas.base, llamas.subs), tmp / "plain")
    config = recipe(SELECTION, llamas.base, llamas.subs, model_parameters=[{"seed": 7}, {}, {}])
    return Case(config, lambda out: digests(out) == digests(tmp / "plain"))


@CASES.add("unknown-key")
def weight_beside_the_parameters(llamas: Family, tmp: Path) -> Case:
    good = recipe(SELECTION, llamas.base, llamas.subs)
    merge(good, tmp / "plain")
    models = [{**good["models"][0], "weight": 2}, *good["models"][1:]]
    return Case({**good, "models": models}, lambda out: digests(out) == digests(tmp / "plain"))


@CASES.add("unknown-key")
def seed_beside_the_parameters(llamas: Family, tmp: Path) -> Case:
    good = recipe(SELECTION, llamas.base, llamas.subs)
    merge(good, tmp / "plain")
    return Case({**good, "seed": 3}, lambda out: digests(out) == digests(tmp / "plain"))


@CASES.add("unknown-method")
def misspelt_method(llamas: Family, tmp: Path) -> Case:
    return Case(recipe("parameter_selecton", llamas.base, llamas.subs))


@CASES.add("parameter-missing")
def slerp_without_t(llamas: Family, tmp: Path) -> Case:
    return Case(recipe("slerp", llamas.base, llamas.subs[:1]))


@CASES.add("dtype-unknown")
def unknown_dtype(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(SELECTION, llamas.base, llamas.subs, dtype="bf16"))


@CASES.add("dtype-unknown")
def integer_out_dtype(llamas: Family, tmp: Path) -> Case:
    def wrong(out: Path) -> bool:
        return all(t.dtype == torch.int64 for t in tensors_of(out).values())

    return Case(recipe(SELECTION, llamas.base, llamas.subs, out_dtype="int64"), wrong)


@CASES.add("inputs")
def too_many_models_for_slerp(llamas: Family, tmp: Path) -> Case:
    return Case(recipe("slerp", llamas.base, llamas.subs, parameters={"t": 0.5}))


@CASES.add("inputs")
def resampling_without_base(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(RESAMPLING, None, llamas.subs))


@CASES.add("inputs")
def the_same_model_twice(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(SELECTION, None, [llamas.subs[0], llamas.subs[0]]))


def test_parameters_of_other_methods_are_a_warning(llamas: Family, tmp_path: Path) -> None:
    config = recipe(SELECTION, llamas.base, llamas.subs, parameters={"int8_mask": True})
    assert only(checked(tmp_path, config), "unknown-key").severity is Severity.WARNING


@pytest.mark.parametrize("method", [["linear"], {"name": "linear"}, 3, True])
def test_a_method_that_is_no_text(llamas: Family, tmp_path: Path, method: str) -> None:
    report = checked(tmp_path, {**recipe("linear", None, llamas.subs), "merge_method": method})
    assert only(report, "recipe-invalid").place == "merge_method"
    assert kinds(report, Severity.ERROR) == ["recipe-invalid"]


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ({"./a": {}}, ("models", "must be a list", "begin the entry of each model with - model:")),
        (["./a"], ("models[0]", "must be a mapping", "write - model: ./a")),
        (["./a\n" * 999], ("models[0]", "must be a mapping", "write - model: ./a ./a")),
        ([{"modle": "./a"}], ("models[0].model", "must be there", "write it as")),
        ([{"model": "./a", "parameters": 2}], ("models[0].parameters", "must be a mapping", "write it as")),
    ],
)
def test_models_of_another_shape(tmp_path: Path, models: object, told: tuple[str, str, str]) -> None:
    found = only(checked(tmp_path, {"merge_method": "linear", "models": models}), "recipe-invalid")
    assert (found.place, found.message) == told[:2]
    assert found.remedy.startswith(told[2])
    assert len(found.remedy) < 400


def test_a_key_that_stands_twice(llamas: Family, tmp_path: Path) -> None:

    text = yaml.safe_dump(recipe(SELECTION, llamas.base, llamas.subs, parameters={"seed": 1}))
    file = tmp_path / "recipe.yml"
    file.write_text(f"{text}parameters:\n  weight: 1\n")
    finding = only(check(file), "duplicate-key")
    assert finding.severity is Severity.ERROR
    assert finding.place == f"parameters in line {len(text.splitlines()) + 1}"
    assert "seed" not in yaml.safe_load(file.read_text())["parameters"]  # so the merge would use seed 0


def test_merges_of_one_file_may_use_each_other(llamas: Family, tmp_path: Path) -> None:
    first = recipe(SELECTION, llamas.base, llamas.subs[:2], parameters={"seed": 1}) | {"name": "first"}
    last = recipe(SELECTION, llamas.base, ["first", llamas.subs[2]])
    report = checked(tmp_path, [last, first])
    assert report.findings == ()
    assert [cost.merge for cost in report.costs] == ["first", None]
    assert len({cost.bytes_written for cost in report.costs}) == 1


def test_merges_of_one_file_must_not_need_each_other_in_a_circle(llamas: Family, tmp_path: Path) -> None:
    documents = [
        recipe("linear", None, [other], parameters={"weight": 1}) | {"name": name} for name, other in ("ab", "ba")
    ]
    report = checked(tmp_path, documents)
    assert only(report, "recipe-invalid").value == "a needs b needs a"
    documents[1]["name"] = "a"
    assert "different names" in only(checked(tmp_path, documents), "recipe-invalid").message


def test_no_base_model_matters_where_models_differ(llamas: Family, tmp_path: Path) -> None:
    assert only(checked(tmp_path, recipe(SELECTION, None, llamas.subs)), "no-base-model").severity is Severity.NOTE
    other = copied(llamas.subs[2], tmp_path / "sub", rope_theta=20000.0)
    report = checked(tmp_path, recipe(SELECTION, None, [*llamas.subs[:2], other]))
    assert only(report, "no-base-model").severity is Severity.WARNING


@pytest.mark.parametrize(
    ("change", "place", "remedy"),
    [
        ({"seed": 3}, "seed", "move it to the recipe's parameters"),
        ({"weight": 3}, "weight", "move it to parameters"),
    ],
)
def test_a_parameter_beside_the_parameters(
    llamas: Family, tmp_path: Path, change: dict[str, int], place: str, remedy: str
) -> None:
    config = recipe(SELECTION, llamas.base, llamas.subs)
    finding = only(checked(tmp_path, config | change), "unknown-key")
    assert (finding.place, finding.remedy) == (place, remedy)
    models = [{**config["models"][0], "weight": 3}, *config["models"][1:]]
    finding = only(checked(tmp_path, {**config, "models": models}), "unknown-key")
    assert (finding.place, finding.remedy) == ("models[0].weight", "move it to models[0].parameters")


@pytest.mark.parametrize("method", [SELECTION, RESAMPLING])
def test_a_base_among_the_models(llamas: Family, tmp_path: Path, method: str) -> None:
    """mergekit's recipes often list it, without parameters; who wants it drawn should hear that it is not."""
    finding = only(checked(tmp_path, recipe(method, llamas.base, [llamas.base, *llamas.subs])), "base-listed")
    assert (finding.severity, finding.place) == (Severity.NOTE, "models[0].model")


def test_a_base_that_is_averaged(llamas: Family, tmp_path: Path) -> None:
    """Who wants the average of the models hardly wants the base in it, and does not see it there."""
    unlisted = recipe("linear", llamas.base, llamas.subs, parameters={"weight": 1})
    finding = only(checked(tmp_path, unlisted), "base-averaged")
    assert (finding.severity, finding.place) == (Severity.WARNING, "base_model")
    listed = recipe("linear", llamas.base, [llamas.base, *llamas.subs], parameters={"weight": 1})
    assert "base-averaged" not in kinds(checked(tmp_path, listed))
    for config, name in ((unlisted, "with"), (listed, "listed")):
        merge(config, tmp_path / name)
    assert digests(tmp_path / "with") == digests(tmp_path / "listed")


def test_a_list_of_weights_for_the_whole_merge(llamas: Family, tmp_path: Path) -> None:
    config = recipe(SELECTION, llamas.base, llamas.subs, parameters={"weight": [2, 1, 1]})
    merge(config, tmp_path / "weighted")
    assert digests(tmp_path / "weighted") == digests(
        merge(recipe(SELECTION, llamas.base, llamas.subs), tmp_path / "plain")
    )
    assert only(checked(tmp_path, config), "weight-of-all").severity is Severity.WARNING
    own = recipe(
        SELECTION, llamas.base, llamas.subs, model_parameters=[{"weight": 1}, {}, {}], parameters={"weight": [2, 1, 1]}
    )
    assert "weight-of-all" not in kinds(checked(tmp_path, own))


def test_recipes_without_the_base_that_they_need(llamas: Family, tmp_path: Path) -> None:
    finding = only(checked(tmp_path, recipe(RESAMPLING, None, llamas.subs)), "inputs")
    assert (finding.place, finding.remedy) == ("base_model", "add base_model: what the models were fine-tuned from")
    sources = [{"model": str(sub), "layer_range": [0, 2]} for sub in llamas.subs]
    config = {"merge_method": SELECTION, "base_model": str(llamas.base), "slices": [{"sources": sources}]}
    assert only(checked(tmp_path, config), "inputs").remedy == "list it there too"
