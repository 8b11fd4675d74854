"""``check`` on the folder that the merge would be written to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mergekit_select.findings import Severity
from tests.check.cases import Case, Cases, checked, kinds, only
from tests.support.checkpoints import (
    copied,
    digests,
    reshard,
    tensors_of,
)
from tests.support.commands import invoke
from tests.support.models import Family
from tests.support.recipes import SELECTION, merge, recipe, written

CASES = Cases()


@CASES.add("out-is-input")
def output_over_an_input(llamas: Family, tmp: Path) -> Case:
    sub = copied(llamas.subs[0], tmp / "out")
    before = digests(sub)
    return Case(recipe(SELECTION, llamas.base, [sub, llamas.subs[1]]), lambda out: digests(out) != before)


@CASES.add("out-not-writable")
def output_where_a_file_is(llamas: Family, tmp: Path) -> Case:
    (tmp / "out").write_text("")
    return Case(recipe(SELECTION, llamas.base, llamas.subs))


@CASES.add("out-stale")
def unsharded_weights_of_an_earlier_merge(llamas: Family, tmp: Path) -> Case:
    out = copied(llamas.base, tmp / "out")

    def wrong(_out: Path) -> bool:
        from transformers import AutoModelForCausalLM

        # transformers loads the weights that were there before
        loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
        return torch.equal(loaded["model.norm.weight"], tensors_of(llamas.base)["model.norm.weight"]) and (
            torch.equal(loaded["lm_head.weight"], tensors_of(llamas.base)["lm_head.weight"])
        )

    config = recipe("linear", None, llamas.subs, parameters={"weight": 1})
    return Case(config, wrong, {"out_shard_size": 20_000})


@CASES.add("out-stale")
def index_of_an_earlier_merge(llamas: Family, tmp: Path) -> Case:
    out = reshard(llamas.base, tmp / "out", 2)

    def wrong(_out: Path) -> bool:
        from mergekit.io import ShardedTensorIndex

        # mergekit reads the index that was there before
        return len(ShardedTensorIndex.from_disk(str(out)).shards) == 2

    return Case(recipe(SELECTION, llamas.base, llamas.subs), wrong)


def test_a_model_that_would_be_overwritten(llamas: Family, tmp_path: Path) -> None:
    config, out = recipe(SELECTION, llamas.base, llamas.subs), copied(llamas.base, tmp_path / "out")
    finding = only(checked(tmp_path, config, out), "out-overwritten")
    assert (finding.severity, finding.value) == (Severity.WARNING, "model.safetensors")


def test_the_record_of_an_earlier_merge(llamas: Family, tmp_path: Path) -> None:
    file = written(tmp_path / "r.yml", recipe(SELECTION, llamas.base, llamas.subs))
    assert invoke("run", "yaml", file, tmp_path / "out", "--quiet").exit_code == 0
    again = recipe(SELECTION, llamas.base, llamas.subs, parameters={"seed": 1})
    finding = only(checked(tmp_path, again, tmp_path / "out"), "out-recorded")
    assert finding.severity is Severity.NOTE
    merge(again, tmp_path / "out")
    said = invoke("verify", tmp_path / "out")
    assert said.exit_code == 1
    assert "where another merge has overwritten the recorded one, remove merge_provenance.json" in said.stdout
    (tmp_path / "out/merge_provenance.json").unlink()
    assert invoke("verify", tmp_path / "out", "--record").exit_code == 0


@pytest.mark.parametrize(("size", "fewer", "files"), [(5_000_000_000, 40_000, 1), (40_000, 20_000, 2)])
def test_the_same_merge_into_the_same_folder(size: int, fewer: int, files: int, llamas: Family, tmp_path: Path) -> None:
    """It overwrites all of the earlier one; in other shards it does not."""
    config, out = recipe(SELECTION, llamas.base, llamas.subs), tmp_path / "out"
    merge(config, out, out_shard_size=size)
    assert len([*out.glob("*.safetensors")]) == files
    assert kinds(checked(tmp_path, config, out, out_shard_size=size)) == []
    assert kinds(checked(tmp_path, config, out, out_shard_size=fewer)) == ["out-stale"]


def test_an_output_name_that_ends_with_a_slash(llamas: Family, tmp_path: Path) -> None:
    report = checked(tmp_path, recipe(SELECTION, llamas.base, llamas.subs), f"{tmp_path}/out/")
    assert kinds(report) == ["out-name"]


def test_a_disk_that_is_full(llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    report = checked(tmp_path, recipe(SELECTION, llamas.base, llamas.subs), tmp_path / "out")
    finding = only(report, "disk-full")
    assert (finding.severity, finding.value) == (Severity.ERROR, "143.2 KB to write, 10 B free")
