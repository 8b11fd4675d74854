"""``verify`` on methods and vocabularies that need not come out the same twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import TensorBatch, merge_method, register, registered_methods
from mergekit.options import MergeOptions

from mergekit_select.verification import Determinism, determinism, verify
from tests.support.checkpoints import changed, save, tensors_of
from tests.support.commands import invoke
from tests.support.models import small_family
from tests.support.recipes import merge
from tests.verification.support import kinds


def test_every_method_of_mergekit_and_ours_is_known() -> None:
    names = {method.spec.name for method in registered_methods()}
    known = {name for name in names if determinism(name) is not Determinism.UNKNOWN}
    assert known >= {name for name in names if not name.startswith("test_")}
    assert {name for name in names if determinism(name) is Determinism.RANDOM} == {
        "arcee_fusion",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
    }


def test_random_method(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"parameters": {"weight": 1, "density": 0.5}}
    recipe = small_family().recipe("dare_ties", **keys)
    out = merge(recipe, tmp_path / "out")
    answer = verify(out)
    assert answer.determinism is Determinism.RANDOM
    assert kinds(answer) == {"bits"}
    result = invoke("verify", out)
    assert result.exit_code == 1
    assert "dare_ties draws at random" in result.output
    assert "UNDECIDED" in result.output


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_what_no_random_method_explains(tmp_path: Path, file: str) -> None:
    """Neither a file that differs nor one of another merge."""
    keys: dict[str, Any] = {"parameters": {"weight": 1, "density": 0.5}}
    out = merge(small_family().recipe("dare_ties", **keys), tmp_path / "out")
    assert verify(out).undecided
    (out / file).write_text("{}")
    assert not verify(out).undecided


def test_random_method_with_the_seed_of_the_merge(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"parameters": {"weight": 1, "density": 0.5}}
    recipe = small_family().recipe("dare_ties", **keys)
    out = merge(recipe, tmp_path / "out", random_seed=3)
    state = torch.random.get_rng_state()
    assert verify(out, options=MergeOptions(random_seed=3)).same
    assert torch.equal(torch.random.get_rng_state(), state)
    assert invoke("verify", out, "--random-seed", 3).exit_code == 0
    assert invoke("verify", out, "--random-seed", 3, "--strict").exit_code == 1


@pytest.mark.parametrize("tokenizer", [{"tokenizer": {"source": "union"}}, {"tokenizer_source": "union"}], ids=str)
def test_union_of_vocabularies_in_another_order(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    family = small_family(rotated=True)
    out = merge(family.recipe(**tokenizer), tmp_path / "out")
    assert verify(out).same
    tensors = tensors_of(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].flip(0).contiguous()
    save(out, tensors)
    answer = verify(out)
    assert (answer.same, answer.undecided) == (False, True)
    (note,) = answer.notes
    assert "PYTHONHASHSEED" not in note.text
    assert "one model, or base, as the tokenizer's source" in note.text
    result = invoke("verify", out)
    assert result.exit_code == 1
    assert "UNDECIDED" in result.output
    tensors["model.norm.weight"] += 1
    save(out, tensors)
    assert not verify(out).undecided
    assert "NOT THE SAME" in invoke("verify", out).output


def test_order_of_a_vocabulary_that_is_no_union(tmp_path: Path) -> None:
    family = small_family(rotated=True)
    out = merge(family.recipe(tokenizer={"source": "base"}), tmp_path / "out")
    tensors = tensors_of(out)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
    save(out, tensors)
    assert (verify(out).undecided, verify(out).notes) == (False, ())


def test_a_method_that_may_round_otherwise(tmp_path: Path) -> None:
    out = merge(small_family().recipe("linear", parameters={"weight": 1}), tmp_path / "out")
    assert verify(out).notes == ()
    changed(out, lambda tensors: tensors["model.norm.weight"].add_(1))
    answer = verify(out)
    assert [note.kind for note in answer.notes] == ["rounding"]
    assert not answer.undecided


@merge_method(name="test_first_model")  # type: ignore[untyped-decorator]  # mergekit does not annotate it
def first_model(batch: TensorBatch) -> torch.Tensor:
    """A method of somebody else's."""
    return batch.tensors[0].clone()


def test_unknown_method(tmp_path: Path) -> None:
    register(first_model)  # it stays registered: mergekit has no way back
    answer = verify(merge(small_family().recipe("test_first_model"), tmp_path / "out"))
    assert answer.determinism is Determinism.UNKNOWN
    assert answer.same
    assert "is an unknown method" in answer.notes[0].text
