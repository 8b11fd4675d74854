"""Models whose tokenizers differ: rows are aligned as the recipe says, and then drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from tests.compatibility import shows
from tests.support import expectation
from tests.support.checkpoints import VOCABULARY, Tensors, copied
from tests.support.expectation import Stored
from tests.support.models import Family, assert_loads
from tests.support.recipes import METHODS, SELECTION, merge, recipe
from tests.support.stored import read_all, rows_of, wanted

both_methods = pytest.mark.parametrize("method", METHODS)


def vocabulary(folder: Path) -> dict[str, int]:
    content = json.loads((folder / "tokenizer.json").read_text())
    known: dict[str, int] = content["model"]["vocab"]
    return known | {token["content"]: token["id"] for token in content["added_tokens"]}


def rotated(source: Path, target: Path) -> Path:
    """The same model with its tokens in another order, and their rows with them."""
    known = vocabulary(source)
    count = len(known) - 1  # the last is <unk>
    order = [(k - 1) % count for k in range(count)] + [count]
    copied(source, target, lambda tensors: tensors.update({name: tensors[name][order] for name in VOCABULARY}))
    file = target / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {t: (k + 1) % count if k < count else k for t, k in known.items()}
    file.write_text(json.dumps(content))
    return target


def with_added_tokens(source: Path, target: Path, tokens: list[str]) -> Path:
    """A model that learnt new tokens: the tokenizer knows them, and the vocabulary's tensors have rows for them."""
    generator = torch.Generator().manual_seed(9)

    def grow(tensors: Tensors) -> None:
        for name in VOCABULARY:
            rows = torch.randn(len(tokens), tensors[name].shape[1], generator=generator).to(tensors[name].dtype)
            tensors[name] = torch.cat([tensors[name], rows])

    tokenizer: Any = tf.AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(tokens)
    copied(source, target, grow, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(target)
    return target


def aligned(out: Path, base: Path, subs: list[Path]) -> list[dict[str, Stored]]:
    """Base and sub-models with their rows in the output's order; who lacks a token has the base's or only holder's."""
    target = vocabulary(out)
    order = sorted(target, key=target.__getitem__)
    folders = [base, *subs]
    known, read = [vocabulary(folder) for folder in folders], read_all(*folders)
    result = [dict(tensors) for tensors in read]
    for name in VOCABULARY:
        rows = []
        for own_vocabulary, own in zip(known, read, strict=True):
            picked = []
            for token in order:
                holders = [k for k, v in enumerate(known) if token in v]
                assert token in own_vocabulary or 0 in holders or len(holders) == 1
                source = own if token in own_vocabulary else read[holders[0]]
                place = (own_vocabulary if token in own_vocabulary else known[holders[0]])[token]
                picked.append(rows_of(source[name], [place]).bits)
            rows.append(Stored(own[name].dtype, (len(order), own[name].shape[1]), np.concatenate(picked)))
        for tensors, row in zip(result, rows, strict=True):
            tensors[name] = row
    return result


@shows("Checkpoints", "tokens in different orders, `tokenizer: {source: base}`", note="rows are aligned, then drawn")
@both_methods
def test_another_order_of_tokens_with_the_tokenizer_of_the_base(llamas: Family, tmp_path: Path, method: str) -> None:
    subs = [rotated(llamas.subs[0], tmp_path / "rotated"), *llamas.subs[1:]]
    out = merge(recipe(method, llamas.base, subs, tokenizer={"source": "base"}), tmp_path / "out")
    assert vocabulary(out) == vocabulary(llamas.base)
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))  # as if in base order
    assert_loads(out)


@shows("Checkpoints", "tokens added in one sub-model, `tokenizer: {source: base}`", note="they are not in the output")
@both_methods
def test_added_tokens_with_the_tokenizer_of_the_base(llamas: Family, tmp_path: Path, method: str) -> None:
    subs = [with_added_tokens(llamas.subs[0], tmp_path / "added", ["<new>", "<newer>"]), *llamas.subs[1:]]
    out = merge(recipe(method, llamas.base, subs, tokenizer={"source": "base"}), tmp_path / "out")
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))
    assert_loads(out)


@shows(
    "Checkpoints",
    "different vocabularies, `tokenizer: {source: union}`",
    note="mergekit orders the tokens by Python's hashes, anew in every run; `PYTHONHASHSEED` helps from Python 3.12 on",
)
@both_methods
def test_the_union_of_vocabularies_under_a_fixed_hash_seed(llamas: Family, tmp_path: Path, method: str) -> None:
    subs = [
        with_added_tokens(llamas.subs[0], tmp_path / "added", ["<new>", "<newer>"]),
        rotated(llamas.subs[1], tmp_path / "rotated"),
        llamas.subs[2],
    ]
    config = recipe(method, llamas.base, subs, tokenizer={"source": "union"})
    for name in ("out", "again") if method == SELECTION else ("out",):
        out = merge(config, tmp_path / name, new_process=True, env={"PYTHONHASHSEED": "1"})
        base_tensors, *tensors = aligned(out, llamas.base, subs)
        expectation.assert_same(expectation.read(out), wanted(method, base_tensors, tensors))
    # Before Python 3.12 the hash of None, which is part of a model's, is an address: no hash seed fixes the order.
    if method == SELECTION and sys.version_info >= (3, 12):
        assert vocabulary(tmp_path / "out") == vocabulary(tmp_path / "again")
        expectation.assert_same(expectation.read(tmp_path / "again"), expectation.read(tmp_path / "out"))
    assert_loads(out)


@shows(
    "Checkpoints",
    "a token added by the recipe, `tokenizer: {source: MODEL, tokens: …}`",
    note="everyone gets the row that its entry names",
)
@both_methods
def test_a_token_that_the_recipe_adds(llamas: Family, tmp_path: Path, method: str) -> None:
    added = with_added_tokens(llamas.subs[0], tmp_path / "added", ["<new>"])
    subs = [added, *llamas.subs[1:]]
    tokenizer = {"source": str(llamas.subs[2]), "tokens": {"<new>": {"source": str(added)}}}
    out = merge(recipe(method, llamas.base, subs, tokenizer=tokenizer), tmp_path / "out")
    assert vocabulary(out) == vocabulary(added)
    base_tensors, *tensors = aligned(out, llamas.base, subs)
    expectation.assert_same(expectation.read(out), wanted(method, base_tensors, tensors))
    assert_loads(out)


@shows(
    "Checkpoints",
    "the same with `source: base`",
    gap=True,
    note="mergekit adds the token to the base's own vocabulary and then finds no row for it: a KeyError",
)
def test_a_token_added_to_the_tokenizer_of_the_base_is_mergekits_error(llamas: Family, tmp_path: Path) -> None:
    added = with_added_tokens(llamas.subs[0], tmp_path / "added", ["<new>"])
    tokenizer = {"source": "base", "tokens": {"<new>": {"source": str(added)}}}
    for method in [*METHODS, "linear"]:
        config = recipe(method, llamas.base, [added, *llamas.subs[1:]], tokenizer=tokenizer)
        config["parameters"] = {"weight": 1.0}
        with pytest.raises(KeyError, match="96"):
            merge(config, tmp_path / method)
