"""``check`` names outputs that the merge would destroy or stumble over, and removes what a killed merge left."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from mergekit_select.check import cost
from mergekit_select.findings import Severity
from mergekit_select.verification import verify
from tests.check.cases import checked, kinds
from tests.support.adapters import write_adapter
from tests.support.checkpoints import copied
from tests.support.commands import invoke
from tests.support.models import Family, small_family
from tests.support.recipes import SELECTION, merge, recipe, written


def errors(folder: Path, config: dict[str, Any], out: Path, **options: Any) -> list[str]:
    return kinds(checked(folder, config, out, **options), Severity.ERROR)


def test_the_folder_of_an_adapter_and_the_cache(llamas: Family, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    config = recipe(SELECTION, llamas.base, [f"{llamas.subs[0]}+{adapter}", llamas.subs[1]])
    cache = tmp_path / "cache"
    for out in (adapter, cache, llamas.subs[0]):
        assert errors(tmp_path, config, out, lora_merge_cache=str(cache)) == ["out-is-input"]
    assert errors(tmp_path, config, tmp_path / "out", lora_merge_cache=str(cache)) == []


def test_the_model_that_gives_the_tokenizer(llamas: Family, tmp_path: Path) -> None:
    other = copied(llamas.subs[2], tmp_path / "other")
    config = recipe(SELECTION, llamas.base, llamas.subs[:2], tokenizer={"source": str(other)})
    assert errors(tmp_path, config, other) == ["out-is-input"]


def test_a_link_that_leads_nowhere(llamas: Family, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert errors(tmp_path, llamas.recipe(), tmp_path / "out") == ["out-not-writable"]


def test_a_name_that_is_too_long(llamas: Family, tmp_path: Path) -> None:
    assert errors(tmp_path, llamas.recipe(), tmp_path / ("o" * 256)) == ["out-not-writable"]


def test_a_disk_on_which_the_tensors_fit_and_the_rest_does_not(
    llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cost,) = checked(tmp_path, llamas.recipe(), tmp_path / "out").costs
    out = merge(llamas.recipe(), tmp_path / "merged")
    needed = sum(file.stat().st_size for file in out.iterdir())
    assert needed > cost.bytes_written
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(needed, 1, needed - 1))
    assert errors(tmp_path, llamas.recipe(), tmp_path / "out") == ["disk-full"]


@pytest.fixture
def left(tmp_path: Path) -> list[Path]:
    """An output with what two killed merges left, old enough that none of them runs any more."""
    out = merge(small_family().recipe(), tmp_path / "out")
    result = [out / ".tmpAb3xY9", out / ".tmpZ7yW2v"]
    for path in result:
        path.write_bytes((out / "model.safetensors").read_bytes()[:5000])
        os.utime(path, (time.time() - 3600,) * 2)
    return result


def test_temporary_files_are_mentioned(left: list[Path], tmp_path: Path) -> None:
    report = checked(tmp_path, small_family().recipe(), tmp_path / "out")
    assert kinds(report).count("out-temporary") == 2
    left[1].unlink()
    answer = verify(tmp_path / "out")
    assert answer.same
    assert [note.kind for note in answer.notes] == ["out-temporary"]


def test_clean_removes_what_is_provably_a_merges(left: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = {
        "notes": out / ".tmpnotes",
        "other": out / ".tmpAAAAAA",
        "now": out / ".tmpBBBBBB",
        "link": out / ".tmpCCCCCC",
        "shard": out / "model-2.safetensors",  # as other people's models have them, too
    }
    kept["notes"].write_text("x")
    kept["other"].write_text("somebody else's")
    os.utime(kept["other"], (0, 0))
    kept["now"].write_bytes(left[0].read_bytes())
    shutil.copy2(left[0], kept["shard"])
    kept["link"].symlink_to(left[0])
    before = {path.name for path in out.iterdir()}
    result = invoke("check", "--clean", out)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [f"removed {path}" for path in left]
    assert before - {path.name for path in out.iterdir()} == {path.name for path in left}
    assert json.loads(invoke("check", "--clean", "--json", out).output)["removed"] == []
    assert invoke("check", "--clean", out / "missing").exit_code == 2
    result = invoke("check", "--clean", written(tmp_path / "r.yml", small_family().recipe()), out)
    assert "this merge would" in result.output
    data = json.loads(invoke("check", "--clean", "--json", tmp_path / "r.yml", out).output)
    assert (data["removed"], data["ok"]) == ([], True)


@pytest.mark.parametrize(("installed", "found"), [(1, 1), (1 << 50, 0), (None, 0)])
def test_more_memory_than_there_is(
    installed: int | None, found: int, llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_memory", lambda: installed)
    report = checked(tmp_path, recipe(SELECTION, llamas.base, llamas.subs), tmp_path / "out")
    assert kinds(report).count("memory") == found


def test_a_system_that_does_not_tell_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", refuse)
    assert cost._memory() is None
