"""`reproduce` makes a published merge again from the record alone, and names what is in the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_select.provenance import merging, reproducing
from tests.provenance.hub_server import Hub
from tests.support.adapters import write_adapter
from tests.support.checkpoints import changed, copied
from tests.support.commands import invoke, one_line
from tests.support.models import small_family
from tests.support.recipes import RESAMPLING, merge, recipe, written


@pytest.fixture
def published(parents: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with a merge me/merge of org/base, org/sub-0 and org/sub-1; the current folder is a stranger's."""
    written(Path("r.yml"), recipe(RESAMPLING, "org/base", ["org/sub-0", "org/sub-1"]))
    assert invoke("run", "yaml", "r.yml", "out", "--quiet").exit_code == 0
    parents.add("me/merge", Path("out"), licence=None)
    (tmp_path / "stranger").mkdir()
    monkeypatch.chdir(tmp_path / "stranger")
    from huggingface_hub import constants

    for name, value in (("HF_HOME", "cache"), ("HF_HUB_CACHE", "cache/hub")):
        monkeypatch.setattr(constants, name, str(tmp_path / "stranger" / value))
    parents.requests.clear()
    return parents


def answer(*arguments: object) -> tuple[int, dict[str, Any]]:
    ran = invoke("reproduce", *arguments, "--json")
    assert ran.stdout, ran.output
    return ran.exit_code, json.loads(ran.stdout)


def kinds(data: dict[str, Any]) -> list[str]:
    return [finding["kind"] for finding in data["findings"]]


def test_same_without_writing_a_tensor(published: Hub) -> None:
    code, data = answer("me/merge")
    assert (code, data["verdict"], data["findings"]) == (0, "same", [])
    assert data["tensors"] > 10
    weights = [request for request in published.requests if "me/merge" in request and "safetensors" in request]
    assert not weights


def test_same_into_a_folder_that_has_a_record_of_its_own(published: Hub) -> None:
    code, data = answer("me/merge@main", "again")
    assert (code, data["verdict"]) == (0, "same")
    assert invoke("verify", "again").exit_code == 0
    table = Path("again/merge_tensors.json").read_bytes()
    assert table == published.files("me/merge")["merge_tensors.json"]
    one_line(invoke("reproduce", "me/merge", "again"), 2, "OUT must be a folder that is not there, or empty")


def test_dry_run_downloads_no_weights(published: Hub) -> None:
    code, data = answer("me/merge", "--dry-run")
    assert (code, data["verdict"]) == (0, "possible")
    files = [published.files(f"org/{name}") for name in ("base", "sub-0", "sub-1")]
    sizes = {name: sum(len(held[name]) for held in files) for name in files[0]}
    assert data["needs"]["read"] == sizes["model.safetensors"]
    assert data["needs"]["download"] == sum(
        size for name, size in sizes.items() if name.endswith((".json", ".safetensors"))
    )
    assert not any("/cdn/" in request for request in published.requests)
    text = invoke("reproduce", "me/merge", "--dry-run").stdout
    assert "bytes to download" in text
    assert text.endswith("POSSIBLE: me/merge\n")


@pytest.mark.parametrize("short", [0, 1])
def test_cache_and_output_on_one_disk(published: Hub, monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    needs = answer("me/merge", "--dry-run")[1]["needs"]
    free = needs["download"] + needs["written"] - short
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    code, data = answer("me/merge", "again", "--dry-run")
    assert (code, kinds(data)) == (short, ["disk-full"] * short)


def gone(hub: Hub, name: str, files: dict[str, bytes]) -> None:
    """Rewrite a repository's history."""
    repository = hub.repositories[name]
    repository.commits.clear()
    repository.refs.clear()
    repository.commit(files)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda hub: hub.repositories.pop("org/base"), ["parent-missing"]),
        (lambda hub: setattr(hub.repositories["org/base"], "gated", True), ["parent-gated"]),
        (lambda hub: gone(hub, "org/base", {"config.json": b"{}"}), ["revision-gone"]),
    ],
)
def test_what_is_in_the_way_is_told_apart(published: Hub, change: Callable[[Hub], object], found: list[str]) -> None:
    change(published)
    code, data = answer("me/merge")
    assert (code, data["verdict"], kinds(data)) == (1, "not possible", found)
    assert data["findings"][0]["place"] == "org/base"
    assert not any("/cdn/" in request for request in published.requests)


def test_moved_branches_do_not_matter(published: Hub) -> None:
    published.add("org/base", {"config.json": b"{}"})
    code, data = answer("me/merge")
    assert (code, data["verdict"], kinds(data)) == (0, "same", ["revision-moved"])


@pytest.fixture
def tagged(parents: Hub) -> Hub:
    """That hub, with a merge me/tagged whose base is at a branch of its own."""
    parents.repositories["org/base"].commit(parents.files("org/base"), "v1")
    written(Path("t.yml"), recipe(RESAMPLING, "org/base@v1", ["org/sub-0", "org/sub-1"]))
    assert invoke("run", "yaml", "t.yml", "tagged", "--quiet").exit_code == 0
    assert invoke("lock", "t.yml").exit_code == 0
    parents.add("me/tagged", Path("tagged"), licence=None)
    parents.repositories["org/base"].commit({"config.json": b"{}"}, "main")
    return parents


def test_a_branch_that_is_gone_does_not_matter(tagged: Hub) -> None:
    del tagged.repositories["org/base"].refs["v1"]
    ran = invoke("lock", "t.yml", "--check")
    assert ran.exit_code == 0, ran.output
    assert "v1 is not on the hub any more; the merge stays at" in ran.output
    code, data = answer("me/tagged")
    assert (code, data["verdict"], kinds(data)) == (0, "same", ["revision-moved"])


def test_rewritten_history_of_a_branch_that_is_not_the_default_one(tagged: Hub) -> None:
    repository, old = tagged.repositories["org/base"], tagged.repositories["org/base"].refs["v1"]
    files = repository.commits[old]
    repository.commit({"x": b""}, "other")
    repository.refs["v1"] = repository.commit(files, "other")
    del repository.commits[old]
    code, data = answer("me/tagged")
    assert (code, data["verdict"], kinds(data)) == (0, "same", ["revision-moved"])


def test_rewritten_history_with_the_same_bytes_does_not_matter(published: Hub) -> None:
    published.repositories["org/base"].commit({"x": b""}, "other")
    files = published.files("org/base")
    repository = published.repositories["org/base"]
    repository.refs["main"] = repository.commit(files, "other")
    del repository.refs["other"]
    old = next(sha for sha, held in repository.commits.items() if held == files)
    del repository.commits[old]
    code, data = answer("me/merge")
    assert (code, data["verdict"], kinds(data)) == (0, "same", ["revision-moved"])


def test_garbled_downloads_are_caught(published: Hub) -> None:
    published.garble("GET /cdn/", times=1)
    code, data = answer("me/merge")
    assert (code, data["verdict"], kinds(data)) == (1, "not possible", ["input-changed"])
    assert "model.safetensors must have the recorded sha256" in data["findings"][0]["message"]


def test_a_download_that_is_cut_off_is_one_line(published: Hub) -> None:
    published.cut("GET /cdn/")
    ran = invoke("reproduce", "me/merge")
    one_line(ran, 2, "asking http://127.0.0.1")


def test_another_recipe_is_not_the_same(published: Hub) -> None:
    files = dict(published.files("me/merge"))
    table = json.loads(files["merge_tensors.json"])
    name = next(iter(table["tensors"]))
    table["tensors"][name]["sha256"] = "0" * 64
    Path("m").mkdir()
    for file, content in files.items():
        Path("m", file).write_bytes(content)
    Path("m/merge_tensors.json").write_text(json.dumps(table))
    one_line(invoke("reproduce", "m"), 2, "must give its sha256")
    import hashlib

    sha256 = hashlib.sha256(Path("m/merge_tensors.json").read_bytes()).hexdigest()
    statement = json.loads(files["merge_provenance.json"])
    statement["predicate"]["runDetails"]["byproducts"][0]["digest"]["sha256"] = sha256
    Path("m/merge_provenance.json").write_text(json.dumps(statement))
    code, data = answer("m")
    assert (code, data["verdict"]) == (1, "not same")
    assert [line.split(":")[0] for line in data["differing"]] == [name]


def test_a_plain_mergekit_model_is_made_as_far_as_that_can_be(published: Hub) -> None:
    files = {k: v for k, v in published.files("me/merge").items() if not k.startswith("merge_")}
    files["mergekit_config.yml"] = (Path("..") / "r.yml").read_bytes()
    published.add("me/plain", files, licence=None)
    code, data = answer("me/plain")
    assert (code, data["verdict"], kinds(data)) == (0, "same", ["not-recorded", "not-recorded"])
    published.add("me/nothing", {"config.json": b"{}"})
    one_line(invoke("reproduce", "me/nothing"), 2, "how it was made cannot be known")


def test_local_parents_are_mapped_and_compared(online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family = small_family()
    for name, source in (("runs/a", family.subs[0]), ("runs/b", family.subs[1])):
        copied(source, Path(name))
    out = merge(recipe("linear", None, ["./runs/a", "./runs/b"], parameters={"weight": 1}), tmp_path / "out")
    assert invoke("verify", "out", "--record").exit_code == 0
    Path("runs").rename("moved")
    code, data = answer(out)
    assert (code, kinds(data)) == (1, ["parent-local", "parent-local"])
    code, data = answer(out, "--map", "./runs=./moved")
    assert (code, data["verdict"]) == (0, "same")
    content = bytearray(Path("moved/b/model.safetensors").read_bytes())
    content[-1] ^= 1
    Path("moved/b/model.safetensors").write_bytes(content)
    code, data = answer(out, "--map", "./runs=./moved")
    assert (code, kinds(data)) == (1, ["input-changed"])


def test_a_lock_is_made(published: Hub) -> None:
    assert invoke("lock", "../r.yml", "--out", "l.json").exit_code == 0
    said = "l.json is a lock, which holds no tensors to compare with: give OUT"
    one_line(invoke("reproduce", "l.json", "--quiet"), 1, said)
    assert "an unknown number to write" in invoke("reproduce", "l.json", "--dry-run").output
    code, data = answer("l.json", "made")
    assert (code, data["verdict"]) == (0, "made")
    assert Path("made/merge_tensors.json").read_bytes() == published.files("me/merge")["merge_tensors.json"]


def test_adapters_are_parents_too(published: Hub) -> None:
    published.add("org/lora", write_adapter(Path("lora")))
    written(Path("l.yml"), recipe("linear", None, ["org/sub-0+org/lora", "org/sub-1"], parameters={"weight": 1}))
    assert invoke("run", "yaml", "l.yml", "merged", "--quiet", "--lora-merge-cache", "lc").exit_code == 0
    content = json.loads(Path("merged/merge_provenance.json").read_text())["predicate"]["buildDefinition"]
    assert content["externalParameters"]["reproducible"] == "bits on the same platform"
    published.add("me/adapted", Path("merged"), licence=None)
    code, data = answer("me/adapted")
    assert (code, data["verdict"], data["findings"]) == (0, "same", [])
    assert invoke("verify", "merged").exit_code == 0  # adapters are merged in a folder of its own
    assert invoke("inspect", "l.yml").exit_code == 0
    gone(published, "org/lora", {"adapter_config.json": b"{}"})
    code, data = answer("me/adapted")
    assert (code, [(f["kind"], f["place"]) for f in data["findings"]]) == (1, [("revision-gone", "org/lora")])


def changed_parent(change: Callable[[Path], object]) -> dict[str, Any]:
    """Record a merge of local models, change one of them, and try to make it again."""
    for name, source in (("a", small_family().subs[0]), ("b", small_family().subs[1])):
        copied(source, Path(name))
    merge(recipe("linear", None, ["./a", "./b"], parameters={"weight": 1}), Path("out"))
    assert invoke("verify", "out", "--record").exit_code == 0
    change(Path("b"))
    code, data = answer("out")
    assert (code, data["verdict"]) == (1, "not possible")
    assert data["findings"][0]["place"] == "./b"
    return data


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "input-missing", "config.json is recorded and not there"),
        (lambda folder: (folder / "new.json").write_text("{}"), "input-changed", "new.json is there and not recorded"),
        (
            lambda folder: (folder / "config.json").write_text("{}"),
            "input-changed",
            "config.json must have the recorded",
        ),
        (lambda folder: folder.rename("elsewhere"), "parent-local", "lay in a folder of whoever made the merge"),
    ],
)
def test_what_changed_in_a_local_parent_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], kind: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = changed_parent(change)
    assert kinds(data) == [kind]
    assert said in data["findings"][0]["message"]


def test_a_folder_that_hides_a_parent_is_refused(published: Hub) -> None:
    copied(small_family().subs[2], Path("org/base"))
    code, data = answer("me/merge")
    assert (code, data["verdict"], kinds(data)) == (1, "not possible", ["local-before-hub"])


def test_code_of_a_parent_is_not_run(published: Hub) -> None:
    config = json.loads(published.files("org/base")["config.json"])
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    code = b"import pathlib\npathlib.Path('ran').write_text('')\n"
    for name in ("org/base", "org/sub-0", "org/sub-1"):
        files = dict(published.files(name)) | {"config.json": json.dumps(config).encode(), "code.py": code}
        published.add(name, files, licence=None)
    written(Path("r.yml"), recipe(RESAMPLING, "org/base", ["org/sub-0", "org/sub-1"]))
    assert invoke("run", "yaml", "r.yml", "out", "--quiet").exit_code == 0
    published.add("me/coded", Path("out"), licence=None)
    code_, data = answer("me/coded", "again")
    assert (code_, data["verdict"]) == (0, "same")
    assert not Path("ran").exists()


def test_a_hub_whose_names_lead_out_of_the_cache_writes_nothing_there(published: Hub, tmp_path: Path) -> None:
    files = dict(published.files("org/base"))
    published.add("org/base", files | {"../../../../escaped.json": b"{}"}, licence=None)
    written(Path("r.yml"), recipe(RESAMPLING, "org/base", ["org/sub-0", "org/sub-1"]))
    ran = invoke("run", "yaml", "r.yml", "out", "--quiet")
    assert ran.exit_code == 2
    assert [line for line in ran.stderr.splitlines() if line.startswith("Error: ")] == ran.stderr.splitlines()[-1:]
    assert not [*tmp_path.rglob("escaped.json")]
    assert not Path("out").exists()


def test_a_record_whose_stage_leads_elsewhere_writes_nothing_there(published: Hub, tmp_path: Path) -> None:
    stage = recipe("linear", None, ["org/sub-0", "org/sub-1"], parameters={"weight": 1})
    written(Path("m.yml"), stage | {"name": "stage"}, recipe("linear", None, ["stage"], parameters={"weight": 1}))
    assert invoke("run", "multi", "m.yml", "--out-path", "out", "-I", "stages", "--quiet").exit_code == 0
    record = Path("out/merge_provenance.json")
    statement = json.loads(record.read_text())
    held = statement["predicate"]["buildDefinition"]["externalParameters"]["recipe"]
    for name in (str(tmp_path / "mine"), "../../mine"):
        held["text"] = Path("m.yml").read_text().replace("stage", name)
        held["sha256"] = hashlib.sha256(held["text"].encode()).hexdigest()
        record.write_text(json.dumps(statement))
        published.add("me/forged", Path("out"), licence=None)
        one_line(invoke("reproduce", "me/forged", "again"), 2, "leads out of it; call it otherwise")
        assert not [*tmp_path.rglob("mine")]
        assert not Path("again").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_that_is_not_what_its_record_says(published: Hub, tmp_path: Path, name: str) -> None:
    """The record alone would be made again, and the folder said to be the same."""
    copied(tmp_path / "out", Path("m"))
    assert answer("m")[1]["verdict"] == "same"
    content = bytearray(Path("m", name).read_bytes())
    content[-2] ^= 1
    Path("m", name).write_bytes(content)
    code, data = answer("m")
    assert (code, data["verdict"], kinds(data)) == (1, "not possible", ["changed"])
    published.add("me/other", Path("m"), licence=None)
    code, data = answer("me/other")
    assert (code, data["verdict"], kinds(data)) == (1, "not possible", ["changed"])


def test_a_file_that_a_published_merge_lacks(published: Hub, tmp_path: Path) -> None:
    copied(tmp_path / "out", Path("m"))
    Path("m/tokenizer.json").unlink()
    published.add("me/other", Path("m"), licence=None)
    for target in ("m", "me/other"):
        code, data = answer(target)
        assert (code, kinds(data)) == (1, ["changed"])


def test_a_model_that_changes_while_a_lock_is_made(
    parents: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, sub in enumerate(small_family().subs[:2]):
        copied(sub, Path(f"s{number}"))
    written(Path("r.yml"), recipe("linear", None, ["./s0", "./s1"], parameters={"weight": 1}))
    assert invoke("lock", "r.yml").exit_code == 0

    def merged_of_another(text: str, place: str, out: Path, options: Any, do: Any = merging.merge) -> None:
        changed(Path("s0"), lambda tensors: tensors.update({name: x + 1 for name, x in tensors.items()}))
        do(text, place, out, options)

    monkeypatch.setattr(reproducing, "merge", merged_of_another)
    one_line(invoke("reproduce", "r.lock.json", "out", "--quiet"), 2, "model ./s0 has changed while it was read")
    assert not Path("out/merge_provenance.json").exists()
