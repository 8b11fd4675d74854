"""``check`` on models that do not fit each other: architectures, layers, names, shapes, dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_select.findings import Severity
from tests.check.cases import Case, Cases, checked, kinds, only
from tests.support.checkpoints import (
    Tensors,
    copied,
    tensors_of,
)
from tests.support.models import Family
from tests.support.recipes import RESAMPLING, SELECTION, layers_of, merge, recipe

CASES = Cases()


@CASES.add("architecture-differs")
def mistral_among_llamas(llamas: Family, tmp: Path) -> Case:
    folder = copied(llamas.subs[0], tmp / "sub", architectures=["MistralForCausalLM"], model_type="mistral")
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("layers-differ")
def fewer_layers(llamas: Family, tmp: Path) -> Case:
    folder = copied(llamas.subs[0], tmp / "sub", num_hidden_layers=2)
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("slices-uneven")
def more_sources_in_the_last_slice(llamas: Family, tmp: Path) -> Case:
    one, other, _ = llamas.subs
    config = {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "slices": [layers_of(0, 1, other), layers_of(1, 3, one, other)],
    }

    def wrong(out: Path) -> bool:  # the head is that of the first of two models
        return torch.equal(tensors_of(out)["lm_head.weight"], tensors_of(one)["lm_head.weight"])

    return Case(config, wrong)


@CASES.add("layer-range")
def layers_beyond_the_last(llamas: Family, tmp: Path) -> Case:
    return Case({"merge_method": "passthrough", "slices": [layers_of(2, 5, llamas.base)]})


@CASES.add("layer-range")
def layers_backwards(llamas: Family, tmp: Path) -> Case:
    def wrong(out: Path) -> bool:  # the config counts the slice as less than nothing
        layers = {name.split(".")[2] for name in tensors_of(out) if ".layers." in name}
        counted: int = json.loads((out / "config.json").read_text())["num_hidden_layers"]
        return counted != len(layers)

    return Case(
        {"merge_method": "passthrough", "slices": [layers_of(0, 3, llamas.base), layers_of(2, 1, llamas.base)]}, wrong
    )


@CASES.add("tensor-missing")
def missing_tensor(llamas: Family, tmp: Path) -> Case:
    folder = copied(llamas.subs[0], tmp / "sub", lambda t: t.pop("model.norm.weight"))
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("tensor-missing")
def base_without_an_optional_tensor(llamas: Family, tmp: Path) -> Case:
    def drop(tensors: Tensors) -> None:
        # The head falls back to the embedding, so both go.
        del tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]

    base = copied(llamas.base, tmp / "base2", drop)
    return Case(recipe(SELECTION, base, llamas.subs))


@CASES.add("shapes-differ")
def larger_vocabulary(llamas: Family, tmp: Path) -> Case:
    def grow(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:2]])

    folder = copied(llamas.subs[0], tmp / "sub", grow, vocab_size=98)
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("shapes-differ")
def narrower_embeddings(llamas: Family, tmp: Path) -> Case:
    def narrow(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:, :-1].clone()

    return Case(recipe(SELECTION, llamas.base, [copied(llamas.subs[0], tmp / "sub", narrow)]))


@CASES.add("tensor-dtype")
def integers_in_one_model(llamas: Family, tmp: Path) -> Case:
    name = "model.norm.weight"
    folder = copied(llamas.subs[0], tmp / "sub", lambda t: t.update({name: t[name].to(torch.int8)}))
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("tensor-dtype")
def float8_among_bfloat16(llamas: Family, tmp: Path) -> Case:
    name = "model.norm.weight"
    folder = copied(llamas.subs[0], tmp / "sub", lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("dry-run")
def float8_for_a_method_that_computes(llamas: Family, tmp: Path) -> Case:
    def cast(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})

    folders = [copied(sub, tmp / sub.name, cast) for sub in (llamas.base, *llamas.subs)]
    return Case(recipe("task_arithmetic", folders[0], folders[1:], parameters={"weight": 0.5}))


@CASES.add("plan-failed")
def module_that_is_not_there(llamas: Family, tmp: Path) -> Case:
    models = [{"model": str(sub)} for sub in llamas.subs]
    return Case({"merge_method": SELECTION, "modules": {"text": {"models": models}}})


@CASES.add("tensor-ignored")
def names_that_the_architecture_does_not_list(llamas: Family, tmp: Path) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    for name in ("a", "b"):
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16))
        model.save_pretrained(tmp / name)

    def wrong(out: Path) -> bool:  # no layer is left
        return not any(".layer." in name for name in tensors_of(out))

    config = recipe("linear", None, [tmp / "a", tmp / "b"], parameters={"weight": 1})
    return Case(config, wrong)


def test_mixed_dtypes_and_a_base_in_another(llamas: Family, tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    base = copied(llamas.base, tmp_path / "base32", widen)
    report = checked(tmp_path, recipe(RESAMPLING, base, llamas.subs))
    assert "here float32" in only(report, "dtypes-mixed").message
    assert "float32 in" in only(report, "base-dtype").value
    report = checked(tmp_path, recipe(RESAMPLING, base, llamas.subs, dtype="bfloat16"))
    assert not {"dtypes-mixed", "base-dtype"} & set(kinds(report))


def test_union_ties_and_tensors_left_out(llamas: Family, tmp_path: Path) -> None:
    other = copied(llamas.subs[0], tmp_path / "sub", lambda t: t.update(extra=torch.zeros(2)), tie_word_embeddings=True)
    report = checked(tmp_path, recipe(SELECTION, llamas.base, [other, llamas.subs[1]], tokenizer={"source": "union"}))
    assert {"tokenizer-union", "ties-differ", "tensor-ignored"} <= set(kinds(report, Severity.WARNING))
    assert "extra" in only(report, "tensor-ignored").place
    assert report.passes()
    assert not report.passes(strict=True)


@pytest.mark.filterwarnings("ignore")
def test_fewer_sources_in_the_last_slice(llamas: Family, tmp_path: Path) -> None:
    config = {
        "merge_method": SELECTION,
        "slices": [layers_of(0, 1, *llamas.subs[:2]), layers_of(1, 3, llamas.subs[1])],
    }
    report = checked(tmp_path, config)
    assert report.passes(), [str(f) for f in report.findings]
    assert report.costs[0].tensors == len(tensors_of(merge(config, tmp_path / "out")))


def test_vocabularies_are_aligned_only_where_they_differ(llamas: Family, tmp_path: Path) -> None:
    for make, remedy in ((larger_vocabulary, "add tokenizer: "), (narrower_embeddings, "choose models of one size")):
        (tmp_path / make.__name__).mkdir()
        report = checked(tmp_path, make(llamas, tmp_path / make.__name__).config)
        assert only(report, "shapes-differ").remedy.startswith(remedy)
