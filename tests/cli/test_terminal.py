"""What a command prints cannot move a terminal's cursor, forge a line, or be one that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_select.errors import escaped
from tests.support.checkpoints import Tensors, changed, copied, edit_json
from tests.support.commands import invoke, run
from tests.support.models import small_family
from tests.support.recipes import merge, written

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
FORGED = "x\nSAME: every bit of out is what its recipe gives"


def renamed(name: str) -> object:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors.pop("model.norm.weight")

    return change


def assert_harmless(output: str) -> None:
    assert output
    assert all(character.isprintable() or character == "\n" for character in output), output
    assert not any(line.startswith("SAME") for line in output.splitlines())


@pytest.mark.parametrize("name", [ESCAPE, FORGED, "\u202egnp.exe"])
def test_tensor_names(name: str, tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    out = merge(family.recipe(), tmp_path / "out", copy_tokenizer=False)
    changed(out, renamed(name))  # type: ignore[arg-type]
    assert_harmless(invoke("verify", out).output)
    assert json.loads(invoke("verify", out, "--json").output)["differences"]
    changed(family.subs[0], renamed(name))  # type: ignore[arg-type]
    recipe = written(tmp_path / "recipe.yml", family.recipe())
    assert_harmless(invoke("check", recipe).output)
    assert_harmless(invoke("inspect", recipe).output)


@pytest.mark.parametrize("name", [ESCAPE, FORGED])
def test_keys_folders_and_files(name: str, tmp_path: Path) -> None:
    family = small_family()
    odd = copied(family.base, tmp_path / name.replace("/", ""))
    recipe = written(tmp_path / "recipe.yml", {**family.recipe(), name: 1, "base_model": str(odd)})
    assert_harmless(invoke("check", recipe).output)
    assert_harmless(invoke("inspect", recipe).output)
    assert_harmless(invoke("check", tmp_path / name).output)
    assert_harmless(invoke("verify", tmp_path / name).output)
    assert_harmless(invoke("check", recipe, f"--{name}").output)
    out = merge(family.recipe(), tmp_path / "out")
    edit_json(out / "config.json", **{name: name})
    (out / f"{name.replace('/', '')}.json").write_text("{}")
    assert_harmless(invoke("verify", out).output)


def test_lone_surrogates(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    index = {"weight_map": {"\ud800": "model-00001-of-00001.safetensors"}}
    (family.base / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = written(tmp_path / "recipe.yml", family.recipe())
    for command in ("check", "inspect"):
        for options in ((), ("--json",)):
            result = invoke(command, recipe, *options)
            assert result.exit_code in (1, 2), result.output
            assert_harmless(result.output)


def test_a_terminal_without_utf_8(tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yml", {**small_family().recipe(), "é…": 1})
    done = run("mergekit-select", "check", recipe, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr


def test_text_that_is_left_alone() -> None:
    assert escaped("model.layers.0 · é … 漢字 {'a': 1}") == "model.layers.0 · é … 漢字 {'a': 1}"
    assert escaped("\ud800\u200d\x85\n") == "\\ud800\\u200d\\x85\\n"
