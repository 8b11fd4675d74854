"""Which files of a folder are a model's: those that a merge may read, that it wrote, or that are published."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.checkpoints import changed, copied
from tests.support.commands import invoke
from tests.support.models import Family
from tests.support.recipes import SELECTION, recipe, written


@pytest.fixture(scope="module")
def merged(llamas: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    file = written(folder / "r.yml", recipe(SELECTION, llamas.base, llamas.subs))
    assert invoke("merge", file, folder / "out", "--jobs", "1").exit_code == 0
    return folder / "out"


def _odd_names(folder: Path) -> None:
    """What lies in people's folders, and no merge reads."""
    (folder / "optimizer.pt").symlink_to(folder / "nowhere")
    (folder / "circle.json").symlink_to(folder / "circle.json")
    for name in ("model.safetensors:Zone.Identifier", "tokenizer.model:Zone.Identifier", "~notes.json", "a\\b.json"):
        (folder / name).write_text("")
    for path in (b"\xff.json", b"\xff"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + path)).write_text("")
    (folder / "README.md").write_text("---\nmodel-index:\n- name: a\n  results:\n  - source: https://a.b\n---\n")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1/model.safetensors").write_bytes(b"another")


def test_files_that_no_merge_reads_are_not_recorded(llamas: Family, tmp_path: Path) -> None:
    """Neither those of a model nor those beside a merge; nor a folder within a model, and be it the merge's."""
    subs = [copied(sub, tmp_path / name) for name, sub in zip("ab", llamas.subs, strict=False)]
    file, out = written(tmp_path / "r.yml", recipe(SELECTION, llamas.base, subs)), subs[0] / "merged"
    assert invoke("lock", file, "--out", tmp_path / "before.json").exit_code == 0
    for sub in subs:
        _odd_names(sub)
    assert invoke("lock", file, "--out", tmp_path / "after.json").exit_code == 0
    before, after = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before == after
    for _ in range(2):
        assert invoke("merge", file, out, "--jobs", "1").exit_code == 0
    subject = json.loads((out / "merge_provenance.json").read_text())["subject"]
    _odd_names(out)
    (out / "circle.json").unlink()  # by its name, transformers would try to read it
    again = invoke("reproduce", out)
    assert again.exit_code == 0, again.output
    assert invoke("verify", out, "--record").exit_code == 0
    assert json.loads((out / "merge_provenance.json").read_text())["subject"] == subject


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "adapter_config.json", "spiece.model"])
def test_a_file_that_would_be_loaded_and_is_not_recorded(merged: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(merged, folder)
    (folder / name).write_text("{}")
    ran = invoke("reproduce", folder)
    assert ran.exit_code == 1
    assert f"error changed at {name}: is not recorded, and may be loaded with the model" in ran.stdout


def test_a_model_that_has_changed_since_is_named(llamas: Family, tmp_path: Path) -> None:
    """The output is not to blame. A lock made anew holds what is there now, and says what that is not any more."""
    models = [copied(sub, tmp_path / name) for name, sub in zip("ab", llamas.subs, strict=False)]
    file, out = written(tmp_path / "r.yml", recipe(SELECTION, llamas.base, models)), tmp_path / "out"
    assert invoke("lock", file).exit_code == 0
    assert invoke("merge", file, out, "--jobs", "1").exit_code == 0
    changed(models[1], lambda tensors: tensors.update({name: tensor + 1 for name, tensor in tensors.items()}))
    said = f"{models[1]}: model.safetensors must have the recorded sha256"
    verified = invoke("verify", out)
    assert verified.exit_code == 1
    assert said in verified.stdout
    locked = invoke("lock", file)
    assert locked.exit_code == 0
    assert f"not as in the last lock: {said}" in locked.stdout
    assert "last lock" not in invoke("lock", file).stdout
