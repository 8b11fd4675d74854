"""`publish` uploads a verified merge by a pull request, with a card; what is cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mergekit_select.errors import UnreadableError
from mergekit_select.provenance.card import read_results
from tests.provenance.hub_server import TOKEN, Hub, Repository
from tests.support.commands import invoke
from tests.support.models import small_family
from tests.support.recipes import RESAMPLING, merge, recipe, written


@pytest.fixture
def merged(parents: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with the parents of the merge in out/, and the account of who made it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    written(Path("r.yml"), recipe(RESAMPLING, "org/base", ["org/sub-0", "org/sub-1"]))
    assert invoke("run", "yaml", "r.yml", "out", "--quiet").exit_code == 0
    return parents


def test_published_with_card_record_and_picture(merged: Hub) -> None:
    result = {"task_type": "text-generation", "dataset_type": "x", "dataset_name": "X", "metric_type": "acc"}
    Path("e.json").write_text(json.dumps({"results": [{**result, "metric_value": 0.5}]}))
    ran = invoke("publish", "out", "me/new", "--evaluation", "e.json")
    assert ran.exit_code == 0, ran.output
    repository = merged.repositories["me/new"]
    commit = repository.refs["main"]
    assert ran.stdout.splitlines()[-1] == f"me/new@{commit}"
    assert repository.private
    assert repository.pulls[1]["status"] == "merged"
    files = merged.files("me/new")
    assert {name: files[name] for name in files if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in Path("out").iterdir()
    }
    card = ModelCard(files["README.md"].decode())
    # Sent by the upload: ModelCard.validate of huggingface_hub 1.x asks huggingface.co whatever HF_ENDPOINT says.
    assert "POST /api/validate-yaml" in merged.requests
    data: Any = card.data
    assert data.base_model == ["org/base", "org/sub-0", "org/sub-1"]
    assert data.to_dict()["base_model_relation"] == "merge"
    assert data.license == "apache-2.0"
    assert data.eval_results[0].metric_value == 0.5
    assert f"{merged.url}/org/base/tree/{merged.repositories['org/base'].refs['main']}" in card.text
    assert "mergekit-select reproduce me/new\n" in card.text
    assert Path("r.yml").read_text().strip() in card.text
    assert "](selected.png)" in card.text
    assert files["selected.png"].startswith(b"\x89PNG")
    assert invoke("publish", "out", "me/new", "--evaluation", "e.json").stdout.endswith(f"me/new@{commit}\n")
    assert len(repository.pulls) == 1
    assert invoke("verify", "me/new").exit_code == 0
    assert invoke("reproduce", f"me/new@{commit}").exit_code == 0


@pytest.mark.parametrize(("private", "option"), [(False, ()), (True, ("--public",))])
def test_a_repository_that_others_may_see_or_may_not(merged: Hub, private: bool, option: tuple[str, ...]) -> None:
    """Nothing is shown to everybody that was to be private, and who wants all to see it hears that they cannot."""
    repository = merged.repositories["me/there"] = Repository(private=private)
    before = repository.commit({".gitattributes": b""})
    ran = invoke("publish", "out", "me/there", "--quiet", *option)
    assert ran.exit_code == 1, ran.output
    said = "is private on the hub; leave --public out" if private else "is public on the hub; give --public"
    assert said in ran.stderr.splitlines()[-1]
    assert repository.refs["main"] == before
    repository.private = not private
    assert invoke("publish", "out", "me/there", "--quiet", *option).exit_code == 0


def test_dry_run_writes_the_card_and_sends_nothing(merged: Hub) -> None:
    merged.requests.clear()
    ran = invoke("publish", "out", "me/new", "--dry-run", "--licence", "mit")
    assert ran.exit_code == 0, ran.output
    assert Path("out/README.md").read_text().startswith("---\n")
    assert "license: mit" in Path("out/README.md").read_text()
    assert "me/new" not in merged.repositories
    assert not any(request.startswith(("POST", "PUT")) for request in merged.requests)


def test_what_the_merge_did_not_write_is_named_before_it_is_sent(merged: Hub) -> None:
    Path("out/notes.txt").write_text("of somebody", "utf-8")
    told = json.loads(invoke("publish", "out", "me/new", "--dry-run", "--json").stdout)["findings"]
    assert [(found["kind"], found["severity"], found["place"]) for found in told] == [
        ("published-beside", "note", "notes.txt")
    ]
    assert invoke("publish", "out", "me/new").exit_code == 0
    assert merged.files("me/new")["notes.txt"] == b"of somebody"


def test_cut_off_leaves_main_as_it_was_and_goes_on(merged: Hub) -> None:
    merged.fail("POST /api/models/me/new/commit", 403, times=1)
    ran = invoke("publish", "out", "me/new")
    one_line_of(ran.stderr, "publishing to me/new")
    repository = merged.repositories["me/new"]
    assert [*merged.files("me/new")] == [".gitattributes"]
    assert [pull["status"] for pull in repository.pulls.values()] == ["draft"]
    merged.requests.clear()
    again = invoke("publish", "out", "me/new")
    assert again.exit_code == 0, again.output
    assert [pull["status"] for pull in repository.pulls.values()] == ["merged"]
    assert not any(request.startswith("PUT") for request in merged.requests), "weights were sent twice"


def test_bytes_that_the_hub_changed_are_not_merged(merged: Hub) -> None:
    merged.change_commits = True
    ran = invoke("publish", "out", "me/new")
    assert ran.exit_code == 1
    assert "config.json must have the recorded gitBlob" in ran.stderr
    assert [*merged.files("me/new")] == [".gitattributes"]


def test_stale_weights_of_an_earlier_merge_are_removed(merged: Hub) -> None:
    merged.add("me/new", {"pytorch_model.bin": b"old", "notes.txt": b"kept"}, licence=None)
    assert invoke("publish", "out", "me/new", "--public").exit_code == 0
    files = merged.files("me/new")
    assert "pytorch_model.bin" not in files
    assert files["notes.txt"] == b"kept"


def test_the_token_is_never_shown(merged: Hub) -> None:
    ran = invoke("publish", "out", "me/new")
    merged.fail("POST /api/models/me/other", 401, X_Error_Message=f"bad {TOKEN}")
    failed = invoke("publish", "out", "me/other")
    assert failed.exit_code == 2
    written_files = b"".join(path.read_bytes() for path in Path().rglob("*") if path.is_file())
    assert TOKEN not in ran.output + failed.output
    assert TOKEN.encode() not in written_files


def test_without_an_account_it_is_one_line(merged: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    failed = invoke("publish", "out", "me/new").stderr
    one_line_of(failed, "401 Unauthorized")
    assert "log in with `hf auth login`" in failed


def test_what_others_may_not_or_cannot_get_is_refused(
    online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    family = small_family()
    online.add("org/a", family.subs[0], licence="cc-by-nc-nd-4.0")
    text = recipe("linear", None, ["org/a", str(family.subs[1])], parameters={"weight": 1})
    written(Path("r.yml"), text)
    assert invoke("run", "yaml", "r.yml", "out", "--quiet").exit_code == 0
    ran = invoke("publish", "out", "me/new", "--json")
    assert ran.exit_code == 1
    found = {finding["kind"] for finding in json.loads(ran.stdout)["findings"] if finding["severity"] == "error"}
    assert found == {"licence", "local-model"}
    assert "me/new" not in online.repositories


def test_what_verify_refuses_is_refused(tmp_path: Path, online: Hub) -> None:
    family = small_family()
    out = merge(recipe("linear", None, family.subs[:2], parameters={"weight": 1}), tmp_path / "out")
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    ran = invoke("publish", out, "me/new", "--allow-local")
    assert ran.exit_code == 1
    assert "NOT THE SAME" in ran.stdout
    assert not online.requests


def one_line_of(text: str, said: str) -> None:
    lines = [line for line in text.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, text
    assert said in lines[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"results": {}}', "a list of objects"),
        ('{"results": [1]}', "a list of objects"),
        ('{"results": [{"a": 1}]}', "EvalResult"),
    ],
)
def test_results_that_are_none(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(text, "utf-8")
    with pytest.raises(UnreadableError, match=says):
        read_results(file)
