"""`lock` resolves hub models from metadata, hashes local folders, stays at its commits and says when it is stale."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from tests.provenance.hub_server import Hub, blob_id
from tests.support.commands import invoke, one_line

FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": b"weights"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_recipe(text: str = "", path: str = "r.yml") -> str:
    default = """\
# why this recipe
merge_method: parameter_selection
base_model: org/base   # at a branch
models:
  - model: "org/a@v1"
  - {model: org/base@main}
"""
    Path(path).write_text(text or default)
    return path


def parents(lock: str = "r.lock.json") -> dict[str, Any]:
    resources = json.loads(Path(lock).read_text())["resolvedDependencies"]
    return {r["annotations"]["reference"]: r for r in resources if "reference" in r.get("annotations", {})}


def add_two(hub: Hub) -> tuple[str, str]:
    base, a = hub.add("org/base", FILES), hub.add("org/a", {**FILES, "model.safetensors": b"other"}, licence=None)
    hub.repositories["org/a"].refs["v1"] = a
    return base, a


def test_hub_models_are_resolved_from_metadata_alone(online: Hub) -> None:
    base, a = add_two(online)
    ran = invoke("lock", write_recipe(), "--pinned", "pinned.yml")
    assert ran.exit_code == 0, ran
    found = parents()
    assert found["org/base"]["uri"] == f"pkg:huggingface/org/base@{base}"
    assert found["org/base"]["digest"] == {"gitCommit": base}
    assert found["org/base"]["annotations"]["licence"] == "apache-2.0"
    assert "licence" not in found["org/a@v1"]["annotations"]
    content = json.loads(Path("r.lock.json").read_text())
    files = {r["uri"]: r for r in content["resolvedDependencies"] if "#" in r["uri"]}
    weights = files[f"pkg:huggingface/org/a@{a}#model.safetensors"]
    assert weights["digest"] == {"sha256": hashlib.sha256(b"other").hexdigest()}
    assert weights["annotations"] == {"size": 5}
    assert files[f"pkg:huggingface/org/a@{a}#config.json"]["digest"] == {"gitBlob": blob_id(b"{}")}
    assert not any("/resolve/" in request for request in online.requests)
    text = Path("pinned.yml").read_text()
    assert text.startswith("# why this recipe\n")
    assert f"base_model: org/base@{base}   # at a branch" in text
    assert yaml.safe_load(text)["models"] == [{"model": f"org/a@{a}"}, {"model": f"org/base@{base}"}]


def test_lock_stays_until_told_to_upgrade(online: Hub) -> None:
    base, _ = add_two(online)
    assert invoke("lock", write_recipe()).exit_code == 0
    moved = online.add("org/base", {**FILES, "model.safetensors": b"newer"})
    ran = invoke("lock", "r.yml", "--check")
    assert ran.exit_code == 0
    assert f"org/base: its branch has moved to {moved}; the merge stays at {base}" in ran.stdout
    assert invoke("lock", "r.yml").exit_code == 0
    assert parents()["org/base"]["digest"] == {"gitCommit": base}
    assert invoke("lock", "r.yml", "--upgrade", "org/base").exit_code == 0
    assert parents()["org/base"]["digest"] == {"gitCommit": moved}
    before = Path("r.lock.json").read_bytes()
    said = "--upgrade must name a model of the recipe, got 'org/bsae'"
    one_line(invoke("lock", "r.yml", "--upgrade", "org/bsae"), 2, said)
    assert Path("r.lock.json").read_bytes() == before


def test_check_names_what_is_stale(online: Hub) -> None:
    local = Path("models/a")
    local.mkdir(parents=True)
    for name, content in FILES.items():
        (local / name).write_bytes(content)
    online.add("org/base", FILES)
    recipe = "merge_method: linear\nbase_model: org/base\nmodels: [{model: ./models/a}]\n"
    assert invoke("lock", write_recipe(recipe)).exit_code == 0
    assert invoke("lock", "r.yml", "--check").exit_code == 0
    (local / "model.safetensors").write_bytes(b"weighty")
    (local / "new.json").write_bytes(b"{}")
    write_recipe(recipe + "# edited\n")
    before = Path("r.lock.json").read_bytes()
    ran = invoke("lock", "r.yml", "--check", "--json", "--allow-crimes")
    assert ran.exit_code == 1
    findings = {(f["kind"], f["place"]): f for f in json.loads(ran.stdout)["findings"]}
    assert findings[("lock-stale", "r.yml")]["value"] == hashlib.sha256(Path("r.yml").read_bytes()).hexdigest()
    assert "--allow-crimes must be False" in findings[("lock-stale", "options")]["message"]
    changed = [f for f in json.loads(ran.stdout)["findings"] if f["kind"] == "input-changed"]
    assert [f["message"].split()[0] for f in changed] == ["model.safetensors", "new.json"]
    assert hashlib.sha256(b"weights").hexdigest() in changed[0]["message"]
    assert changed[0]["value"] == hashlib.sha256(b"weighty").hexdigest()
    assert Path("r.lock.json").read_bytes() == before


def test_what_is_installed_is_compared(online: Hub) -> None:
    """Another package may give other bits, which is a note; other draws of ours do, which is an error."""
    online.add("org/base", FILES)
    assert invoke("lock", write_recipe("merge_method: linear\nmodels: [{model: org/base}]\n")).exit_code == 0
    lock = Path("r.lock.json")
    lock.write_text(re.sub(r"pkg:pypi/torch@[^\"]+", "pkg:pypi/torch@2.2.0", lock.read_text()))
    ran = invoke("lock", "r.yml", "--check")
    assert ran.exit_code == 0, ran.output
    assert "made with torch 2.2.0" in ran.output
    lock.write_text(lock.read_text().replace('"draws": 1', '"draws": 2'))
    ran = invoke("lock", "r.yml", "--check")
    assert ran.exit_code == 1
    assert "the draws must be of version 2, as recorded (got 1)" in ran.output


def test_adapters_slices_stages_and_tokenizers_are_inputs(online: Hub) -> None:
    for name in ("base", "one", "two", "lora", "words"):
        online.add(f"org/{name}", FILES)
    text = """\
name: first
merge_method: passthrough
slices:
  - sources: [{model: org/one+org/lora, layer_range: [0, 1]}]
---
merge_method: linear
models:
  - model: first
  - model: {model: {path: org/two, revision: main}}
tokenizer: {source: org/words}
parameters: {weight: 1}
"""
    ran = invoke("lock", write_recipe(text), "--pinned", "p.yml")
    assert ran.exit_code == 0, ran
    roles = {reference: resource["annotations"]["roles"] for reference, resource in parents().items()}
    assert roles == {
        "org/one": ["model"],
        "org/lora": ["adapter"],
        "org/two@main": ["model"],
        "org/words": ["tokenizer"],
    }
    first, last = yaml.safe_load_all(Path("p.yml").read_text())
    at = {name: online.repositories[name].refs["main"] for name in online.repositories}
    assert first["slices"][0]["sources"][0]["model"] == f"org/one@{at['org/one']}+org/lora@{at['org/lora']}"
    assert first["name"] == "first"
    assert [m["model"] for m in last["models"]] == ["first", f"org/two@{at['org/two']}"]


def test_a_local_folder_that_hides_a_hub_model_is_told(online: Hub) -> None:
    add_two(online)
    Path("org/base").mkdir(parents=True)
    Path("org/base/config.json").write_text("{}")
    ran = invoke("lock", write_recipe())
    assert ran.exit_code == 0
    assert "local-before-hub at org/base: mergekit takes the folder org/base below the current one" in ran.stdout
    assert parents()["org/base"]["uri"] == "file:org/base"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (dict(status=401), "401"),
        (dict(status=500), "500"),
        (dict(status=429, Retry_After="1"), "429"),
        (dict(status=404, X_Error_Code="RepoNotFound"), "404"),
        (dict(status=403, X_Error_Code="GatedRepo"), "ask its owners for access"),
        (dict(status=404, X_Error_Code="RevisionNotFound"), "name a branch, tag or commit that is there"),
    ],
)
def test_what_the_hub_refuses_is_one_line(online: Hub, fault: dict[str, Any], said: str) -> None:
    add_two(online)
    online.fail("GET /api/models/org/base", **fault)
    ran = invoke("lock", write_recipe())
    assert ran.exit_code == 2
    assert ran.stderr.startswith("Error: model org/base")
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not Path("r.lock.json").exists()


def test_the_cache_is_not_trusted_for_a_file_that_changed(tmp_path: Path) -> None:
    from mergekit_select.inputs import digests

    store, file = tmp_path / "d.json", tmp_path / "f"
    file.write_bytes(b"one")
    os.utime(file, (1e9, 1e9))
    first = digests.Digests(store)
    first._known[str(file)] = [[1, 2, 3, 4], {"sha256": "of another state"}]
    assert first.of(file)["sha256"] == hashlib.sha256(b"one").hexdigest()
    first.save()
    file.write_bytes(b"two")
    os.utime(file, (1e9, 1e9))
    assert digests.Digests(store).of(file)["sha256"] == hashlib.sha256(b"two").hexdigest()
    store.write_text("[1")
    assert digests.Digests(store).of(file)["gitBlob"] == blob_id(b"two")


def test_offline_what_a_merge_has_downloaded_is_enough(parents: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit downloads no cards."""
    write_recipe("merge_method: linear\nmodels: [{model: org/sub-0}, {model: org/sub-1}]\nparameters: {weight: 1}\n")
    assert invoke("run", "yaml", "r.yml", "out", "--quiet", "--no-provenance").exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    locked = invoke("lock", "r.yml")
    assert locked.exit_code == 0, locked.output
    assert parents.repositories["org/sub-0"].refs["main"] in locked.stdout
