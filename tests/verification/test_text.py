"""What ``verify`` says, line by line, of every kind of difference, and its verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_select import kinds
from mergekit_select.findings import finding
from mergekit_select.verification import Determinism, Difference, Verification
from mergekit_select.verification.text import as_data, render

BITS = Difference("d", "bits", "0 (0x0000)", "1 (0x3f80)", 1234, 5678, (3, 7))
UNFINISHED = finding(kinds.CONFIG_MISSING, "config.json")
DISAGREEING = finding(kinds.FILES_DISAGREE, "config.json", problem="it differs")


def answer(*differences: Difference, **keys: Any) -> Verification:
    defaults: dict[str, Any] = {
        "output": Path("out"),
        "recipe": Path("out/mergekit_config.yml"),
        "method": "linear",
        "determinism": Determinism.ARITHMETIC,
        "tensors": 21,
        "parameters": 19_616,
        "problems": (),
        "notes": (),
    }
    return Verification(**{**defaults, "differences": differences, **keys})


def test_a_line_for_each_kind_of_difference() -> None:
    differences = (
        Difference("a", "missing", "bfloat16 [32]", None),
        Difference("b", "extra", None, "float32 [2]"),
        Difference("c", "renamed", "c", "other"),
        BITS,
        Difference("e", "dtype", "bfloat16 [32]", "float16 [32]", elements=32),
        Difference("f", "shape", "bfloat16 [2, 4]", "bfloat16 [4, 2]", elements=8),
    )
    note = finding(kinds.NO_TOKENIZER, "tokenizer", problem="there is none")
    assert render(answer(*differences, problems=(DISAGREEING,), notes=(note,))) == [
        "inconsistent: config.json: it differs",
        "missing: a: the recipe gives bfloat16 [32]",
        "extra: b: float32 [2], the recipe gives none",
        "renamed: c: the output calls it other",
        "bits: d: 1,234 of 5,678 elements, first at [3, 7]: expected 0 (0x0000), found 1 (0x3f80)",
        "dtype: e: expected bfloat16 [32], found float16 [32]",
        "shape: f: expected bfloat16 [2, 4], found bfloat16 [4, 2]",
        "note: the recipe gives no tokenizer: there is none",
        "NOT THE SAME: out: 6 tensors are not what its recipe gives; "
        "21 tensors with 19,616 parameters compared (linear)",
    ]


@pytest.mark.parametrize(
    ("differences", "keys", "verdict"),
    [
        ((), {}, "SAME: every bit of out is what its recipe gives; "),
        ((), {"recipe": Path("recipes/other.yml")}, "SAME: every bit of out is what recipes/other.yml gives; "),
        ((BITS,), {}, "NOT THE SAME: out: 1 tensor is not what its recipe gives; "),
        (
            (),
            {"problems": (DISAGREEING,)},
            "NOT THE SAME: out: every tensor is what the recipe gives, but the files do not agree; ",
        ),
        ((), {"problems": (UNFINISHED,)}, "NOT THE SAME: out: unfinished; "),
        (
            (BITS,),
            {"problems": (DISAGREEING, UNFINISHED)},
            "NOT THE SAME: out: unfinished; 1 tensor is not what its recipe gives; ",
        ),
        (
            (BITS,),
            {"undecided": True, "determinism": Determinism.RANDOM},
            "UNDECIDED: out: 1 tensor is not what its recipe gives, and the method is random; ",
        ),
        (
            (BITS,),
            {"undecided": True},
            "UNDECIDED: out: 1 tensor is not what its recipe gives, "
            "and the order of a union of vocabularies is random; ",
        ),
    ],
)
def test_verdict(differences: tuple[Difference, ...], keys: dict[str, Any], verdict: str) -> None:
    (*_, last) = render(answer(*differences, **keys))
    assert last == verdict + "21 tensors with 19,616 parameters compared (linear)"


def test_verdict_without_a_recipe() -> None:
    assert render(answer(recipe=None))[-1] == "NOT VERIFIED: out is unfinished, nothing was compared"


def test_twenty_differences_are_all_listed() -> None:
    lines = render(answer(*[BITS] * 20))
    assert [line.startswith("bits: ") for line in lines] == [True] * 20 + [False]


def test_as_data() -> None:
    note = finding(kinds.NO_TOKENIZER, "tokenizer", problem="there is none")
    data = as_data(answer(BITS, problems=(DISAGREEING,), notes=(note,)))
    assert data["ok"] is False
    assert data["problems"] == [{"kind": "inconsistent", "place": "config.json", "text": "it differs"}]
    assert data["notes"] == ["the recipe gives no tokenizer: there is none"]
    assert data["differences"] == (BITS,)
