"""Checkpoints in every form that mergekit reads, LoRA adapters among them, merge to the bits that they should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as tf

from tests.compatibility import shows
from tests.support import expectation
from tests.support.architectures import WORKING, write_models
from tests.support.checkpoints import copied, pickled, reshard, tied, without
from tests.support.models import Family, assert_loads
from tests.support.recipes import METHODS, SELECTION, merge, recipe
from tests.support.stored import read_all, wanted

SHARDS = [None, 2, 5, 3]
both_methods = pytest.mark.parametrize("method", METHODS)


@shows("Checkpoints", "one file and several shards, each model sharded in its own way")
@both_methods
def test_models_sharded_in_different_ways(llamas: Family, tmp_path: Path, method: str) -> None:
    base, *subs = [
        reshard(folder, tmp_path / folder.name, count) if count else folder
        for folder, count in zip(llamas.everyone, SHARDS, strict=True)
    ]
    out = merge(recipe(method, base, subs), tmp_path / "out")
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))
    assert_loads(out)


@shows("Checkpoints", lambda lazy: f"`.bin` files, with{'' if lazy else 'out'} `--lazy-unpickle`")
@both_methods
@pytest.mark.parametrize("lazy", [False, True])
def test_pickled_checkpoints(llamas: Family, tmp_path: Path, method: str, lazy: bool) -> None:
    base, *subs = [pickled(folder, tmp_path / folder.name) for folder in llamas.everyone]
    out = merge(recipe(method, base, subs), tmp_path / "out", lazy_unpickle=lazy)
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))
    assert_loads(out)


@shows("Checkpoints", "embeddings tied in all models", note="untied in all: every other row; tied ones are drawn once")
@both_methods
def test_tied_embeddings_are_drawn_once(llamas: Family, tmp_path: Path, method: str) -> None:
    base, *subs = [tied(folder, tmp_path / folder.name) for folder in llamas.everyone]
    out = merge(recipe(method, base, subs), tmp_path / "out")
    found = expectation.read(out)
    assert "lm_head.weight" not in found
    expectation.assert_same(found, wanted(method, base, subs))
    assert_loads(out)


@shows(
    "Checkpoints",
    lambda which: f"embeddings tied in {which}, untied in the others",
    note="two tensors, each with draws of its own; the tied one stands in for both",
)
@both_methods
@pytest.mark.parametrize("which", ["one sub-model", "the base"])
def test_tied_and_untied_embeddings_mixed(llamas: Family, tmp_path: Path, method: str, which: str) -> None:
    folders = llamas.everyone
    place = 1 if which == "one sub-model" else 0
    folders[place] = tied(folders[place], tmp_path / "tied")
    out = merge(recipe(method, folders[0], folders[1:]), tmp_path / "out")
    tensors = read_all(*folders)
    tensors[place]["lm_head.weight"] = tensors[place]["model.embed_tokens.weight"]
    expectation.assert_same(expectation.read(out), wanted(method, tensors[0], tensors[1:]))
    assert_loads(out)
    model = tf.LlamaForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@shows("Checkpoints", "tensors that the architecture does not know", note="mergekit silently leaves them out")
@both_methods
def test_extra_tensors_are_left_out(llamas: Family, tmp_path: Path, method: str) -> None:
    extra = copied(llamas.subs[0], tmp_path / "extra", lambda tensors: tensors.update({"more.weight": torch.ones(3)}))
    out = merge(recipe(method, llamas.base, [extra, *llamas.subs[1:]]), tmp_path / "out")
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))


@pytest.fixture(scope="module")
def opts(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models of an architecture that mergekit infers, so that every tensor is optional."""
    opt = next(architecture for architecture in WORKING if architecture.title == "OPT")
    return write_models(opt, tmp_path_factory.mktemp("opts"))


OPTIONAL = "model.decoder.layers.1.fc1.bias"


@shows("Checkpoints", "an optional tensor that one sub-model lacks", note="drawn among those that have it")
@both_methods
def test_a_tensor_is_drawn_among_the_sub_models_that_have_it(opts: Family, tmp_path: Path, method: str) -> None:
    base, subs = opts.base, opts.subs
    lacking = copied(subs[1], tmp_path / "lacking", without(OPTIONAL))
    out = merge(recipe(method, base, [subs[0], lacking, subs[2]]), tmp_path / "out", copy_tokenizer=False)
    found, all_have = expectation.read(out), wanted(method, base, subs)
    two = [{OPTIONAL: tensors[OPTIONAL]} for tensors in read_all(base, subs[0], subs[2])]
    expectation.assert_same(found, all_have | wanted(method, two[0], two[1:]))


@shows("Checkpoints", "an optional tensor that only one sub-model or only the base has", note="copied")
@both_methods
@pytest.mark.parametrize("holder", [0, 2])
def test_a_tensor_that_only_one_has_is_copied(opts: Family, tmp_path: Path, method: str, holder: int) -> None:
    base, subs = opts.base, opts.subs
    folders = [
        folder if k == holder else copied(folder, tmp_path / folder.name, without(OPTIONAL))
        for k, folder in enumerate([base, *subs])
    ]
    out = merge(recipe(method, folders[0], folders[1:]), tmp_path / "out", copy_tokenizer=False)
    expectation.assert_same(
        {OPTIONAL: expectation.read(out)[OPTIONAL]}, {OPTIONAL: expectation.read(folders[holder])[OPTIONAL]}
    )


@shows(
    "Checkpoints",
    "an optional tensor that the base lacks and sub-models have, with `base_model`",
    gap=True,
    note="mergekit refuses it for every method to which the base is not one input among others; `linear` averages the "
    "rest. Selection does without `base_model`",
)
def test_a_tensor_that_the_base_lacks_is_mergekits_error(opts: Family, tmp_path: Path) -> None:
    base, subs = opts.base, opts.subs
    lacking = copied(base, tmp_path / "lacking", without(OPTIONAL))
    for method in [*METHODS, "task_arithmetic", "multislerp"]:
        config = recipe(method, lacking, subs, parameters={"weight": 1.0})
        with pytest.raises(ValueError, match=f"^Base input is not present in merge inputs for {re.escape(OPTIONAL)}$"):
            merge(config, tmp_path / method, copy_tokenizer=False)
    out = merge(recipe(SELECTION, None, subs), tmp_path / "out", copy_tokenizer=False)
    expectation.assert_same(expectation.read(out), wanted(SELECTION, base, subs))
