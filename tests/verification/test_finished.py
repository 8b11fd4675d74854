"""``verify`` tells an unfinished output, and files of another merge, from an output that is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mergekit_select.verification import verify
from tests.support.checkpoints import edit_json, weight_map
from tests.support.commands import invoke
from tests.support.models import small_family
from tests.support.recipes import merge
from tests.verification.support import TENSORS, kinds, problems


def test_sharded(sharded: Path) -> None:
    assert verify(sharded).same


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_file_that_is_written_last_is_missing(shards: Path, file: str) -> None:
    (shards / file).unlink()
    answer = verify(shards)
    assert kinds(answer) == {"unfinished"}
    assert answer.problems[0].place == file
    assert answer.differences == ()
    assert invoke("verify", shards).exit_code == 1


def test_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00007.safetensors").unlink()
    answer = verify(shards)
    assert kinds(answer) == {"unfinished", "missing"}
    assert answer.problems[0].place == "model-00002-of-00007.safetensors"


def test_interrupted_after_some_shards(shards: Path, tmp_path: Path) -> None:
    """What is there when the process ends before the shards get their names."""
    for number in range(1, 8):
        path = shards / f"model-{number:05d}-of-00007.safetensors"
        path.rename(shards / f"model-{number}.safetensors") if number < 4 else path.unlink()
    for file in ("config.json", "model.safetensors.index.json", "mergekit_config.yml"):
        shutil.move(shards / file, tmp_path / file)
    answer = verify(shards)
    assert kinds(answer) == {"unfinished"}
    assert [problem.place for problem in answer.problems][-1] == "mergekit_config.yml"
    with_recipe = verify(shards, tmp_path / "mergekit_config.yml")
    assert kinds(with_recipe) == {"unfinished", "missing"}


def test_no_recipe(out: Path) -> None:
    (out / "mergekit_config.yml").unlink()
    result = invoke("verify", out)
    assert result.exit_code == 1
    assert "--no-write-model-card" in result.output
    assert "NOT VERIFIED" in result.output
    answer = verify(out)
    assert (answer.tensors, answer.parameters, answer.undecided) == (0, 0, False)


def test_only_a_recipe(out: Path) -> None:
    (out / "model.safetensors").unlink()
    answer = verify(out)
    text = "no weights are there: the merge has not ended; merge again"
    assert problems(answer) == [("unfinished", "model.safetensors", text)]
    assert len(answer.differences) == TENSORS


def test_sharded_merge_over_an_unsharded_one(merged: Path, tmp_path: Path) -> None:
    """The trap: transformers would load the older model.safetensors."""
    family = small_family()
    out = merge(family.recipe(parameters={"seed": 1}), tmp_path / "out")
    merge(family.recipe(), out, out_shard_size=8_000)
    answer = verify(out)
    assert {problem.kind for problem in answer.problems} == {"stale"}
    assert kinds(answer) == {"stale", "bits"}


def test_fewer_shards_over_more(shards: Path) -> None:
    merge(small_family().recipe(), shards, out_shard_size=20_000)
    answer = verify(shards)
    assert kinds(answer) == {"stale"}
    assert len(answer.problems) == 7
    assert "NOT THE SAME" in invoke("verify", shards).output


def test_pickled_weights_beside(out: Path) -> None:
    merge(small_family().recipe(), out, safe_serialization=False)
    assert [problem.place for problem in verify(out).problems] == ["pytorch_model.bin"]


def test_tensor_that_the_index_does_not_name(shards: Path) -> None:
    with weight_map(shards) as files:
        del files["model.norm.weight"]
    assert kinds(verify(shards)) == {"inconsistent"}


def test_tensor_that_the_index_puts_elsewhere(shards: Path) -> None:
    with weight_map(shards) as files:
        files["model.norm.weight"] = "model-00001-of-00007.safetensors"
    assert kinds(verify(shards)) == {"inconsistent"}


def test_total_size(shards: Path) -> None:
    edit_json(shards / "model.safetensors.index.json", metadata={"total_size": 3})
    (problem,) = verify(shards).problems
    assert "39232 bytes" in problem.text


@pytest.mark.parametrize("change", ["deleted", "elsewhere"])
def test_shard_that_the_index_forgets_is_no_other_merges(tmp_path: Path, change: str) -> None:
    """Deleting it would destroy the output."""
    shards = merge(small_family().recipe(), tmp_path / "out", out_shard_size=2_000)
    with weight_map(shards) as files:
        named = sorted(files.values())
        alone = next(name for name, file in sorted(files.items()) if named.count(file) == 1)
        shard = files.pop(alone)
        if change == "elsewhere":
            files[alone] = next(file for file in named if file != shard)
    answer = verify(shards)
    assert kinds(answer) == {"inconsistent"}
    assert shard in {problem.place for problem in answer.problems}
    assert "delete" not in invoke("verify", shards).output


def test_index_that_names_nothing(shards: Path) -> None:
    edit_json(shards / "model.safetensors.index.json", weight_map={})
    assert kinds(verify(shards)) == {"inconsistent"}
    assert "delete" not in invoke("verify", shards).output


def test_index_that_names_nothing_among_shards_of_two_merges(shards: Path) -> None:
    """Which of them is the older cannot be told."""
    merge(small_family().recipe(), shards, out_shard_size=20_000)
    edit_json(shards / "model.safetensors.index.json", weight_map={})
    assert {problem.kind for problem in verify(shards).problems} == {"stale"}
    assert "delete" not in invoke("verify", shards).output


def test_shards_of_an_older_merge_that_an_entry_names(shards: Path) -> None:
    merge(small_family().recipe(), shards, out_shard_size=20_000)
    with weight_map(shards) as files:
        files["model.norm.weight"] = "model-00001-of-00007.safetensors"
    stale = {problem.place for problem in verify(shards).problems if problem.kind == "stale"}
    assert stale == {f"model-{number:05d}-of-00007.safetensors" for number in range(2, 8)}


def test_a_temporary_file_of_an_older_merge_is_noted(out: Path) -> None:
    left = out / ".tmpAb12Cd"
    left.write_bytes((out / "model.safetensors").read_bytes()[:200])
    os.utime(left, (0, 0))
    answer = verify(out)
    assert answer.same
    assert [(note.kind, note.place) for note in answer.notes] == [("out-temporary", left.name)]
