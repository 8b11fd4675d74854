"""The quickstart: its text in parts that share nothing, its order, its tokenizer, and its training step by step."""

import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from examples.order_study.data.parts import Example
from examples.order_study.data.samples import encode_part
from examples.order_study.settings import Architecture, Run, Training
from examples.order_study.train import trainer
from examples.order_study.train.states import States
from examples.quickstart import train as quickstart


def test_no_run_of_eight_words_occurs_in_two_parts_and_no_passage_twice() -> None:
    parts = quickstart.split()
    seen: dict[tuple[str, ...], str] = {}
    for part, passages in parts.items():
        for passage in passages:
            words = re.findall(r"\w+", passage.lower())
            for start in range(len(words) - 7):
                run = tuple(words[start : start + 8])
                assert seen.setdefault(run, part) == part, f"{' '.join(run)!r} occurs in {seen[run]} and {part}"
    assert max(Counter(passage for passages in parts.values() for passage in passages).values()) == 1
    size = {part: sum(map(len, passages)) for part, passages in parts.items()}
    share = {part: size[part] / sum(size.values()) for part in size}
    assert share == pytest.approx({"base": 0.45, "fine_tuning": 0.4, "held_out": 0.15}, abs=0.05)


def test_no_line_of_the_source_is_lost() -> None:
    parts = quickstart.split()
    kept = {" ".join(line.split()) for passages in parts.values() for p in passages for line in p.split("\n")}
    source = (" ".join(line.split()) for topic in topics.values() for line in topic.split("\n"))
    assert not {line for line in source if line and len(line) <= 400} - kept


def test_passages_keep_to_the_limit_and_long_lines_are_cut() -> None:
    passages = quickstart.join(["one", "two", "x" * 25, "four\nfive\nsix and seven"], 10)
    assert passages == ["one\n\ntwo", "x" * 10, "x" * 10, "x" * 5, "four\nfive", "six and se", "ven"]


def test_passages_that_share_eight_words_are_one_group() -> None:
    words = list("abcdefghij")
    passages = [" ".join(words[:8]), "nothing shared", " ".join(words), "z " + " ".join(words[2:]), "y"]
    assert quickstart.groups(passages) == [0, 1, 0, 0, 4]


def test_the_order_never_changes() -> None:
    # From the shell: for i in 0 1 2 3 4 5 6 7; do echo $(printf 1/0/$i | sha256sum) $i; done | sort
    assert quickstart.permutation(8, 1, 0) == [5, 1, 2, 0, 4, 7, 6, 3]
    orders = {tuple(quickstart.permutation(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_tokenizer_gives_every_text_back() -> None:
    tokenizer = quickstart.train_tokenizer(["some text to learn from " * 5], 300, 100)
    assert {name: getattr(tokenizer, name) for name in quickstart.TOKENS} == quickstart.TOKENS
    for text in ["some text", "  def f():\n\treturn 'ü → 🙂'\n"]:
        ids = quickstart.encode(text, tokenizer)
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids[1:-1]) == text


def test_the_loop_and_the_studys_trainer_give_the_same_bits(tmp_path: Path) -> None:
    passages = [f"passage {i} " * (1 + i % 4) for i in range(19)]
    tokenizer = quickstart.train_tokenizer(passages, 300, 100)
    shape = Architecture(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    one, other = (trainer.fresh_model(shape, tokenizer, seed=0) for _ in range(2))
    with trainer.reproducible(threads=1):
        quickstart.train(one, [quickstart.encode(text, tokenizer) for text in passages], order=3, epochs=2, rate=1e-2)
    run = Run(
        name="m",
        part="base",
        start=None,
        architecture=shape,
        training=Training(epochs=2, learning_rate=1e-2),
        composition="redrawn",
        device="cpu",
        threads=1,
        order=3,
    )
    samples = encode_part("base", [Example("", text) for text in passages], tokenizer, 100).samples
    states = States(tmp_path / "m", {}, None)
    trainer.train(other, samples, tokenizer, run, states, (), lambda *_: None)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
