"""``check`` on tokenizers, vocabularies and chat templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_select.check.models import token_ids
from mergekit_select.findings import Severity
from tests.check.cases import Case, Cases, checked, kinds, only
from tests.support.checkpoints import (
    VOCABULARY,
    Tensors,
    copied,
    edit_json,
    tensors_of,
)
from tests.support.models import Family
from tests.support.recipes import SELECTION, Recipe, merge, recipe

CASES = Cases()


@CASES.add("chat-template")
def unknown_chat_template(llamas: Family, tmp: Path) -> Case:
    config = recipe(SELECTION, llamas.base, llamas.subs, chat_template="chatlm", tokenizer={"source": "base"})
    return Case(config)


@CASES.add("tokenizers-differ")
def swapped_tokens(llamas: Family, tmp: Path) -> Case:
    folder = copied(llamas.subs[0], tmp / "sub")
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["t3"], vocabulary["t4"] = 4, 3
    file.write_text(json.dumps(described))

    def wrong(
        out: Path,
    ) -> bool:
        # The output's tokenizer is the base's, and its row 3 mixes t3 of the base with the sub-model's t4.
        ids = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
        rows = [tensors_of(model)["model.embed_tokens.weight"][3].float() for model in (llamas.base, folder)]
        mixed = tensors_of(out)["model.embed_tokens.weight"][3].float()
        return ids["t3"] == 3 and torch.allclose(mixed, (rows[0] + rows[1]) / 2, atol=0.01)

    return Case(recipe("linear", llamas.base, [llamas.base, folder], parameters={"weight": 1}), wrong)


def does_not_load(out: Path) -> bool:
    from transformers import AutoModelForCausalLM

    with pytest.raises(Exception, match=r"size|mismatch"):
        AutoModelForCausalLM.from_pretrained(out)
    return True


@CASES.add("config-invalid")
def vocab_size_that_is_not_the_embeddings(llamas: Family, tmp: Path) -> Case:
    base = copied(llamas.base, tmp / "base2", vocab_size=90)
    return Case(recipe(SELECTION, base, llamas.subs), does_not_load)


@CASES.add("tokenizer-invalid")
def token_from_a_model_that_has_it_not(llamas: Family, tmp: Path) -> Case:
    tokens = {"<new>": {"source": {"kind": "model_token", "model": str(llamas.subs[0]), "token": "absent"}}}
    config = recipe(SELECTION, llamas.base, llamas.subs, tokenizer={"source": "base", "tokens": tokens})
    return Case(config)


@CASES.add("tokenizer-invalid")
def tokenizer_without_files(llamas: Family, tmp: Path) -> Case:
    base = copied(llamas.base, tmp / "base2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).unlink()
    return Case(recipe(SELECTION, base, llamas.subs, tokenizer={"source": "base"}))


@CASES.add("tokenizer-invalid")
def new_token_without_a_source(llamas: Family, tmp: Path) -> Case:
    tokenizer = {"source": "base", "tokens": {"<new>": {}}}
    return Case(recipe(SELECTION, llamas.base, llamas.subs, tokenizer=tokenizer))


@CASES.add("tokenizer-invalid")
def forced_token_without_a_source(llamas: Family, tmp: Path) -> Case:
    tokenizer = {"source": "base", "tokens": {"t1": {"force": True}}}
    return Case(recipe(SELECTION, llamas.base, llamas.subs, tokenizer=tokenizer))


@pytest.mark.filterwarnings("ignore")
def test_a_token_that_all_models_have_needs_no_source(
    llamas: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = {"source": "base", "tokens": {"t1": {}}}
    config = recipe(SELECTION, llamas.base, llamas.subs, tokenizer=tokenizer)
    assert checked(tmp_path, config).passes()
    assert capfd.readouterr().err == ""  # mergekit has a progress bar here
    merge(config, tmp_path / "out")


@pytest.mark.parametrize(("templates", "found"), [(("a", "b"), 1), (("a", "b", "b"), 0), (("a",), 0), ((), 0)])
def test_chat_templates_that_are_as_frequent(
    llamas: Family, tmp_path: Path, templates: tuple[str, ...], found: int
) -> None:
    """mergekit counts them in the order of a set, and takes the first of the most frequent ones."""
    subs = [copied(sub, tmp_path / name) for name, sub in zip("xyz", llamas.subs, strict=True)]
    for number, (sub, template) in enumerate(zip(subs, templates, strict=False)):
        if number:
            edit_json(sub / "tokenizer_config.json", chat_template=template)
        else:
            (sub / "chat_template.jinja").write_text(f"{template}\n")
    config = recipe(SELECTION, llamas.base, subs, chat_template="auto", tokenizer={"source": "base"})
    assert kinds(checked(tmp_path, config)).count("chat-template") == found


def test_what_an_unknown_chat_template_does_without_a_tokenizer_section(llamas: Family, tmp_path: Path) -> None:
    config = recipe(SELECTION, llamas.base, llamas.subs, chat_template="chatlm")
    assert "leave an output without a tokenizer" in only(checked(tmp_path, config), "chat-template").message
    out = merge(config, tmp_path / "out")
    assert not (out / "tokenizer.json").exists()
    finding = only(checked(tmp_path, {**config, "tokenizer": {"source": "base"}}), "chat-template")
    assert "fail after the merge" in finding.message


def test_the_order_of_a_union_is_not_promised(llamas: Family, tmp_path: Path) -> None:
    report = checked(tmp_path, recipe(SELECTION, llamas.base, llamas.subs, tokenizer_source="union"))
    finding = only(report, "tokenizer-union")
    assert "before Python 3.12" in finding.message
    assert finding.remedy == "name one model, or base, as the source"


def test_vocabularies_of_different_sizes_are_aligned_or_cut(llamas: Family, tmp_path: Path) -> None:
    def grow(tensors: Tensors) -> None:
        for name in VOCABULARY:
            tensors[name] = torch.cat([tensors[name], tensors[name][:2]])

    larger = copied(llamas.subs[0], tmp_path / "larger", grow, vocab_size=98)
    file = larger / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["vocab"].update(new=96, newer=97)
    file.write_text(json.dumps(described))
    config = recipe(SELECTION, llamas.base, [larger, llamas.subs[1]])
    assert kinds(checked(tmp_path, config), Severity.ERROR) == ["shapes-differ"]
    variants: list[tuple[Recipe, dict[str, Any]]] = [
        ({"tokenizer": {"source": "base"}}, {}),
        ({"tokenizer": {"source": str(larger), "pad_to_multiple_of": 64}}, {}),
        ({}, {"unsafe_truncate_embeddings": True}),
    ]
    for changes, options in variants:
        report = checked(tmp_path, config | changes, **options)
        assert report.passes()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        held = tensors_of(merge(config | changes, tmp_path / "out", **options))
        assert report.costs[0].bytes_written == sum(t.numel() * t.element_size() for t in held.values())


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"vocab.json": {"a": 0}, "added_tokens.json": {"b": 1}}, {"a": 0, "b": 1}),
        ({"vocab.json": {"a": 0}}, {"a": 0}),
        ({"vocab.txt": "a\nb\n"}, {"a": 0, "b": 1}),
        ({"tokenizer.json": {"model": {"vocab": [["a", -1.5], ["b", -2.5]]}}}, {"a": 0, "b": 1}),
        (
            {"tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b", "id": 7}]}},
            {"a": 0, "b": 7},
        ),
        ({"tokenizer.model": "sentencepiece"}, None),
    ],
    ids=["added", "json", "txt", "unigram", "tokenizers", "sentencepiece"],
)
def test_ids_by_token_in_every_kind_of_file(files: dict[str, Any], ids: dict[str, int] | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert token_ids(tmp_path) == ids
