"""`run multi` records each of its merges; `reproduce` makes one again from models alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mergekit.merge
import pytest
import yaml

from mergekit_select.provenance import stages
from tests.provenance.hub_server import Hub
from tests.support.checkpoints import edit_json
from tests.support.commands import invoke, one_line
from tests.support.models import small_family
from tests.support.recipes import RESAMPLING, recipe, written

RUN = ("run", "multi", "m.yml", "-I", "parts", "--out-path", "out", "--quiet")


@pytest.fixture
def hub_of_models(parents: Hub) -> Hub:
    """A hub with org/base and two sub-models; m.yml averages these, changes the result, and resamples that."""
    average = {"name": "average", **recipe("linear", None, ["org/sub-0", "org/sub-1"], parameters={"weight": 1})}
    again = {"name": "again", **recipe("linear", None, ["average", "org/sub-1"], parameters={"weight": 1})}
    written(Path("m.yml"), average, again, recipe(RESAMPLING, "org/base", ["again", "org/sub-0"]))
    return parents


def definition(folder: str) -> dict[str, Any]:
    content = json.loads(Path(folder, "merge_provenance.json").read_text())["predicate"]["buildDefinition"]
    assert isinstance(content, dict)
    return content


def models(folder: str) -> set[str]:
    heads = (resource.get("annotations", {}) for resource in definition(folder)["resolvedDependencies"])
    return {told["reference"] for told in heads if "reference" in told}


def answer(*arguments: object) -> tuple[int, str]:
    ran = invoke("reproduce", *arguments, "--json")
    assert ran.stdout, ran.output
    return ran.exit_code, json.loads(ran.stdout)["verdict"]


def test_each_merge_is_recorded_and_made_again(hub_of_models: Hub) -> None:
    ran = invoke(*RUN)
    assert ran.exit_code == 0, ran.output
    assert definition("out")["externalParameters"]["recipe"]["text"] == Path("m.yml").read_text()
    assert models("out") == {"org/base", "org/sub-0", "org/sub-1"}
    assert models("parts/again") == models("parts/average") == {"org/sub-0", "org/sub-1"}
    text = definition("parts/again")["externalParameters"]["recipe"]["text"]
    assert [document.get("name") for document in yaml.safe_load_all(text)] == ["average", None]
    for folder in ("out", "parts/again", "parts/average"):
        assert invoke("verify", folder).exit_code == 0
        assert answer(folder, f"made-of-{Path(folder).name}") == (0, "same")
    assert answer("parts/average") == (0, "same")
    one_line(invoke("reproduce", "out"), 1, "is made by several merges, which need a folder; give OUT")
    hub_of_models.add("me/merge", Path("out"), licence=None)
    shutil.rmtree("parts")
    assert answer("me/merge", "of-the-hub") == (0, "same")


def test_a_lock_of_several_merges_is_checked_and_made(hub_of_models: Hub) -> None:
    assert invoke("lock", "m.yml").exit_code == 0
    hub_of_models.add("org/base", {"config.json": b"{}"})
    assert invoke(*RUN, "--locked", "m.lock.json").exit_code == 0
    assert answer("m.lock.json", "made") == (0, "made")
    assert Path("made/merge_tensors.json").read_bytes() == Path("out/merge_tensors.json").read_bytes()
    Path("m.yml").write_text(Path("m.yml").read_text().replace("weight: 1", "weight: 2"))
    one_line(invoke(*RUN, "--locked", "m.lock.json"), 1, "the recipe must be the recorded one")
    documents = [document for document in yaml.safe_load_all(Path("m.yml").read_text()) if "name" in document]
    written(Path("named.yml"), *documents)
    assert invoke("lock", "named.yml").exit_code == 0
    one_line(invoke("reproduce", "named.lock.json", "none"), 1, "must have a merge without a name")


def test_folders_of_another_merge_are_not_recorded(hub_of_models: Hub) -> None:
    assert invoke(*RUN).exit_code == 0
    assert invoke("lock", "m.yml").exit_code == 0
    shutil.rmtree("out")
    assert invoke(*RUN).exit_code == 0  # goes on where it stopped
    assert Path("out/merge_provenance.json").exists()
    shutil.rmtree("out")
    weights = Path("parts/average/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    ran = invoke(*RUN)
    assert ran.exit_code == 0
    assert "out is not recorded: no record says that parts/average is of this file; --no-lazy merges" in ran.stderr
    assert not Path("out/merge_provenance.json").exists()
    one_line(invoke(*RUN, "--locked", "m.lock.json"), 1, "no record says that out, parts/average is of this file")
    assert invoke(*RUN, "--no-lazy", "--locked", "m.lock.json").exit_code == 0
    assert answer("out", "made") == (0, "same")
    assert invoke(*RUN[:3], "-I", "more", "--out-path", "plain", "--no-provenance", "--quiet").exit_code == 0
    assert not Path("plain/merge_provenance.json").exists()


def test_a_model_that_changes_while_it_is_merged_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family = small_family().copied(tmp_path / "models")
    average = {"name": "average", **recipe("linear", None, family.subs[:2], parameters={"weight": 1})}
    written(Path("m.yml"), average, recipe(RESAMPLING, family.base, ["average", family.subs[2]]))

    def merged(*arguments: Any, do: Any = mergekit.merge.run_merge, **options: Any) -> None:
        edit_json(family.subs[0] / "config.json", changed=True)
        do(*arguments, **options)

    monkeypatch.setattr(stages, "run_merge", merged)
    ran = invoke(*RUN)  # mergekit-multi draws a progress bar whatever --quiet says
    assert ran.exit_code == 2
    assert f"Error: model {family.subs[0]} has changed while it was read, so nothing is recorded" in ran.stderr
    assert Path("parts/average/config.json").exists()
    assert not Path("parts/average/merge_provenance.json").exists()
