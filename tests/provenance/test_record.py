"""A merge writes its record; `--locked` refuses other inputs; `verify` looks at the record first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit.options import MergeOptions

from mergekit_select.bits import digest
from mergekit_select.errors import PlanError
from mergekit_select.execution import local
from mergekit_select.provenance import lock, require_opened
from tests.provenance.hub_server import TOKEN, Hub, environment
from tests.support.adapters import write_adapter
from tests.support.checkpoints import copied, tensors_of
from tests.support.commands import invoke, one_line
from tests.support.models import small_family
from tests.support.recipes import RESAMPLING, merge, recipe, written


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def published(parents: Hub) -> Hub:
    """That hub, and a recipe of its models."""
    written(Path("r.yml"), recipe(RESAMPLING, "org/base", ["org/sub-0", "org/sub-1@main"]))
    return parents


def read(path: str) -> dict[str, object]:
    content: dict[str, object] = json.loads(Path(path).read_text())
    return content


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_merge_of_hub_models_records_commits_files_and_tensors(published: Hub) -> None:
    ran = invoke("run", "yaml", "r.yml", "out", "--quiet")
    assert ran.exit_code == 0, ran.output
    statement = json.loads(Path("out/merge_provenance.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["recipe"]["text"] == Path("r.yml").read_text()
    assert definition["externalParameters"]["reproducible"] == "bits"
    heads = published.repositories["org/sub-1"].refs["main"]
    assert yaml.safe_load(Path("out/mergekit_config.yml").read_text())["models"][1] == {"model": f"org/sub-1@{heads}"}
    table = json.loads(Path("out/merge_tensors.json").read_text())["tensors"]
    assert {name: entry["sha256"] for name, entry in table.items()} == {
        name: digest(tensor) for name, tensor in tensors_of(Path("out")).items()
    }
    assert statement["subject"][0]["name"] == "."
    assert "README.md" not in {subject["name"] for subject in statement["subject"]}
    published.add("org/sub-1", {"config.json": b"{}"})  # the branch moves, and the record does not
    assert invoke("verify", "out").exit_code == 0
    flip(Path("out/model.safetensors"))
    ran = invoke("verify", "out")
    assert ran.exit_code == 1
    assert ran.stdout.startswith("changed: model.safetensors: must have the recorded sha256")
    assert "bits: " in ran.stdout
    Path("out/tokenizer.json").unlink()
    assert "changed: tokenizer.json: is recorded and not there" in invoke("verify", "out").stdout


def test_what_a_killed_process_left_of_a_record_is_removed(tmp_path: Path) -> None:
    out = merge(recipe("linear", None, small_family().subs[:2], parameters={"weight": 1}), tmp_path / "out")
    for name in ("merge_provenance.json.123.tmp", "merge_tensors.json.123.tmp"):
        (out / name).write_text("{")
    assert invoke("verify", out, "--record").exit_code == 0
    assert not [*out.glob("*.tmp")]


def test_files_of_two_merges_are_not_recorded_as_one(published: Hub) -> None:
    assert invoke("run", "yaml", "r.yml", "out", "--quiet").exit_code == 0
    before = Path("out/merge_provenance.json").read_bytes()
    written(Path("other.yml"), recipe("linear", None, ["org/sub-0", "org/sub-1"], parameters={"weight": 1}))
    ran = invoke("run", "yaml", "other.yml", "out", "--quiet", "--out-shard-size", 10_000)
    assert ran.exit_code == 2
    assert "only what one merge wrote can be recorded, and out/" in ran.stderr.splitlines()[-1]
    assert Path("out/merge_provenance.json").read_bytes() == before
    for shard in Path("out").glob("model-*"):
        shard.unlink()
    Path("out/model.safetensors.index.json").unlink()
    assert invoke("run", "yaml", "other.yml", "out", "--quiet").exit_code == 0
    assert invoke("verify", "out").exit_code == 0


def test_a_forged_record_cannot_move_a_commit_that_the_recipe_names(published: Hub) -> None:
    first = published.repositories["org/sub-1"].refs["main"]
    text = Path("r.yml").read_text().replace("org/sub-1@main", f"org/sub-1@{first}")
    Path("r.yml").write_text(text)
    assert invoke("run", "yaml", "r.yml", "out", "--quiet").exit_code == 0
    published.add("org/sub-1", small_family().subs[2])
    second = published.repositories["org/sub-1"].refs["main"]
    record = Path("out/merge_provenance.json")
    statement = json.loads(record.read_text())
    for entry in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
        entry["uri"] = entry["uri"].replace(f"org/sub-1@{first}", f"org/sub-1@{second}")
        if entry["uri"].endswith(second):
            entry["digest"] = {"gitCommit": second}
    record.write_text(json.dumps(statement))
    one_line(invoke("verify", "out"), 2, "must be at the commit that the recipe names")


def test_an_input_that_changes_between_merge_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = small_family().copied(tmp_path / "models")
    written(tmp_path / "r.yml", family.recipe())

    def merged(*arguments: Any, do: Any = local.merge, **options: Any) -> Any:
        outcome = do(*arguments, **options)
        flip(family.subs[0] / "model.safetensors")
        return outcome

    monkeypatch.setattr(local, "merge", merged)
    refused = invoke("merge", tmp_path / "r.yml", tmp_path / "out", "--jobs", 1, "--quiet")
    one_line(refused, 2, "has changed while it was read")
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "merge_provenance.json").exists()


def test_a_branch_that_moves_while_its_model_is_opened(published: Hub) -> None:
    text, heads = Path("r.yml").read_text(), [hosted.refs["main"] for hosted in published.repositories.values()]
    definition = lock(text, "r.yml", MergeOptions())
    opened = [f"/cache/models--org--x/snapshots/{commit}/config.json" for commit in heads]
    require_opened(definition, opened)
    with pytest.raises(PlanError, match="model org/sub-1@main has moved on the hub while it was opened; repeat"):
        require_opened(definition, opened[:-1])


def test_our_executor_records_the_commits_that_it_opened(hub: Hub, tmp_path: Path) -> None:
    """The first model pins a commit of the base's repository; the base is at its branch."""
    family = small_family()
    pinned = hub.add("org/runs", family.subs[0])
    hub.add("org/runs", family.base)
    hub.add("org/sub-1", family.subs[1])
    written(Path("r.yml"), recipe(RESAMPLING, "org/runs", [f"org/runs@{pinned}", "org/sub-1@main"]))
    in_own_process(hub, tmp_path, "merge", "r.yml", "out", "--jobs", "1", "--quiet")
    used = json.loads(Path("out/merge_provenance.json").read_text())["predicate"]["buildDefinition"]
    uris = {resource["uri"].rpartition("@")[2] for resource in used["resolvedDependencies"]}
    assert {pinned, *(hosted.refs["main"] for hosted in hub.repositories.values())} <= uris
    hub.add("org/runs", family.subs[2])  # the branch moves, and neither model does
    in_own_process(hub, tmp_path, "verify", "out", "--quiet")


def test_an_adapter_over_a_hub_model(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/base", small_family().base)
    hub.add("org/sub", small_family().subs[0])
    write_adapter(Path("lora"))
    written(Path("r.yml"), recipe("linear", None, ["org/base+./lora", "org/sub"], parameters={"weight": 1}))
    cache = ("--lora-merge-cache", "cache", "--quiet")
    in_own_process(hub, tmp_path, "merge", "r.yml", "out", "--jobs", "1", *cache)
    in_own_process(hub, tmp_path, "verify", "out", *cache)


def in_own_process(hub: Hub, tmp_path: Path, *arguments: str) -> None:
    """transformers remembers hubs that it asked."""
    program = [sys.executable, "-m", "mergekit_select.cli", *arguments]
    subprocess.run(program, env={**os.environ, **environment(hub, tmp_path / "home")}, check=True)


def test_locked_takes_the_commits_of_the_lock(published: Hub) -> None:
    assert invoke("lock", "r.yml").exit_code == 0
    locked = published.repositories["org/base"].refs["main"]
    published.add("org/base", {"config.json": b"{}"})
    assert invoke("run", "yaml", "r.yml", "out", "--locked", "r.lock.json", "--quiet").exit_code == 0
    assert yaml.safe_load(Path("out/mergekit_config.yml").read_text())["base_model"] == f"org/base@{locked}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: flip(Path("a/model.safetensors")), "model.safetensors must have the recorded sha256"),
        (lambda: Path("r.yml").write_text(Path("r.yml").read_text() + "#\n"), "the recipe must be the recorded one"),
        (lambda: Path("a/config.json").unlink(), "config.json is recorded and not there"),
    ],
)
def test_locked_refuses_anything_else(online: Hub, change: Callable[[], object], said: str) -> None:
    family = small_family()
    for name, source in (("base", family.base), ("a", family.subs[0]), ("b", family.subs[1])):
        copied(source, Path(name))
    written(Path("r.yml"), recipe("linear", None, ["./a", "./b"], parameters={"weight": 1}))
    assert invoke("lock", "r.yml").exit_code == 0
    change()
    ran = invoke("run", "yaml", "r.yml", "out", "--locked", "r.lock.json", "--quiet")
    one_line(ran, 1, said)
    assert not Path("out").exists()


def test_bytes_that_the_hub_garbles_are_refused(published: Hub) -> None:
    published.garble("GET /cdn/")
    ran = invoke("run", "yaml", "r.yml", "out", "--quiet")
    assert ran.exit_code == 1
    assert "org/base: model.safetensors must have the recorded sha256" in ran.stderr
    assert not Path("out").exists()


def test_verify_records_what_stock_mergekit_wrote(tmp_path: Path) -> None:
    family = small_family()
    out = merge(recipe("linear", None, family.subs[:2], parameters={"weight": 1}), tmp_path / "out")
    assert invoke("verify", out, "--record").exit_code == 0
    assert invoke("verify", out).exit_code == 0
    definition = json.loads((out / "merge_provenance.json").read_text())["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["reproducible"] == "bits on the same platform"
    flip(out / "model.safetensors")
    before = (out / "merge_provenance.json").read_bytes()
    assert invoke("verify", out, "--record").exit_code == 1
    assert (out / "merge_provenance.json").read_bytes() == before


def test_options_that_an_output_does_not_tell_are_not_recorded(tmp_path: Path) -> None:
    config = recipe("linear", None, small_family().subs[:2], parameters={"weight": 1})
    out = merge(config, tmp_path / "out", out_shard_size=20_000, safe_serialization=False)
    for _ in range(2):
        assert invoke("verify", out, "--record").exit_code == 0
        definition = json.loads((out / "merge_provenance.json").read_text())["predicate"]["buildDefinition"]
        options = definition["externalParameters"]["options"]
        assert options["safe_serialization"] is False
        assert "out_shard_size" not in options
    assert invoke("reproduce", out).exit_code == 0


def test_verify_of_a_model_on_a_hub(published: Hub) -> None:
    assert invoke("run", "yaml", "r.yml", "out", "--quiet").exit_code == 0
    published.add("me/merge", Path("out"), licence=None)
    ran = invoke("verify", "me/merge@main")
    assert ran.exit_code == 0, ran.output
    published.fail("GET /api/models/me/merge", 403, X_Error_Code="GatedRepo")
    one_line(invoke("verify", "me/merge@other"), 2, "model me/merge@other: ")


def test_nothing_is_recorded_in_the_cache(published: Hub, tmp_path: Path) -> None:
    assert invoke("run", "yaml", "r.yml", "out", "--quiet", "--no-provenance").exit_code == 0
    published.add("me/merge", Path("out"), licence=None)
    one_line(invoke("verify", "me/merge", "--record", "--quiet"), 2, "--record writes into the folder of a merge")
    assert not [*tmp_path.rglob("merge_provenance.json")]


def test_verify_and_publish_take_the_recorded_options(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    copied(small_family().base, Path("a"))
    text = recipe("passthrough", None, ["./a"])
    written(Path("c.yml"), text)
    assert invoke("run", "yaml", "c.yml", "out", "--no-copy-tokenizer", "--quiet").exit_code == 0
    assert invoke("verify", "out").exit_code == 0
    ran = invoke("verify", "out", "--copy-tokenizer")
    assert ran.exit_code == 1
    assert "tokenizer" in ran.stdout
    assert invoke("publish", "out", "me/new", "--allow-local").exit_code == 0
    statement = json.loads(Path("out/merge_provenance.json").read_text())
    statement["predicate"]["buildDefinition"]["externalParameters"]["options"]["trust_remote_code"] = True
    Path("out/merge_provenance.json").write_text(json.dumps(statement))
    from mergekit.options import MergeOptions

    from mergekit_select.provenance.locking import recorded_options
    from mergekit_select.provenance.recording import read_record

    kept = read_record(Path("out"))
    assert kept is not None
    options = recorded_options(kept[0].definition, MergeOptions(), {"copy_tokenizer"})
    assert (options.trust_remote_code, options.copy_tokenizer) == (False, True)
