"""Models on a hub are read without their weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.support.checkpoints import Tensors, copied
from tests.support.commands import run
from tests.support.hub import serving
from tests.support.models import Family
from tests.support.recipes import SELECTION, recipe, written


def test_hub_models_are_checked_without_their_weights(llamas: Family, tmp_path: Path) -> None:
    def ballast(tensors: Tensors) -> None:
        tensors["ballast"] = torch.zeros(4_000_000)  # so that a download would show

    folders = {f"team/{name}": copied(llamas.base, tmp_path / name, ballast) for name in ("base", "other")}
    written(folders["team/other"] / "mergekit_config.yml", recipe(SELECTION, "team/base", ["team/one", "team/two"]))
    absent = written(tmp_path / "absent.yml", recipe(SELECTION, "team/base", ["team/other", "team/absent"]))
    there = written(tmp_path / "there.yml", recipe(SELECTION, "team/base", ["team/other"]))
    with serving(folders) as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        first, second = (run("mergekit-select", "check", file, "--json", env=environment) for file in (absent, there))
    assert (first.returncode, second.returncode) == (1, 0), first.stderr + second.stderr
    missing, good = json.loads(first.stdout), json.loads(second.stdout)
    assert (missing["ok"], good["ok"]) == (False, True)
    assert [f["kind"] for f in missing["findings"] if f["severity"] == "error"] == ["model-missing"]
    kinds = [finding["kind"] for finding in good["findings"]]
    assert kinds.count("hub-id-not-pinned") == 2
    assert "same-file" not in kinds
    assert "seed-repeats" in kinds
    assert good["costs"][0]["tensors"] == 30
    assert sum(hub.sent.values()) < 1_000_000
    assert hub.sent["model.safetensors"] < 500_000
    assert len(hub.requests) < 60


def test_repositories_that_cannot_be_merged(llamas: Family, tmp_path: Path) -> None:
    contents = {
        "gguf-alone": ["model.gguf"],
        "nothing": ["README.md"],
        "gguf": ["config.json", "model.gguf"],
        "config-alone": ["config.json"],
    }
    folders = {"team/base": llamas.base}
    for name, files in contents.items():
        folders[f"team/{name}"] = folder = tmp_path / name
        folder.mkdir()
        for file in files:
            there = llamas.base / file
            (folder / file).write_bytes(there.read_bytes() if there.exists() else b"GGUF")
    merging = written(tmp_path / "recipe.yml", recipe(SELECTION, "team/base", [*folders][1:]))
    with serving(folders) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run("mergekit-select", "check", merging, "--json", env=environment)
    assert done.returncode == 1, done.stderr
    errors = [finding for finding in json.loads(done.stdout)["findings"] if finding["severity"] == "error"]
    kinds = ["model-quantised", "model-missing", "model-quantised", "model-missing"]
    assert [(finding["place"].split(".")[0], finding["kind"]) for finding in errors] == [
        (f"models[{number}]", kind) for number, kind in enumerate(kinds)
    ]
