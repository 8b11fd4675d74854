"""``mergekit-select inspect``: its text and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.inspection.support import ran
from tests.support.checkpoints import save, tensors_of
from tests.support.commands import to_full_disk
from tests.support.models import small_family
from tests.support.recipes import RESAMPLING, written


def test_text(tmp_path: Path) -> None:
    result = ran(small_family().recipe(parameters={"rounds": 1}), tmp_path)
    assert result.exit_code == 0
    assert "parameter_selection_resampling, seed 0, rounds 1" in result.output
    assert "21 tensors, 19,616 parameters, 3 sub-models" in result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 100
    for start in ("1 ", "left at the base", "layer ", "outside the layers", "self_attn.q_proj ", "norm "):
        assert any(line.startswith(start) for line in lines), start


def test_long_names_keep_their_end(tmp_path: Path) -> None:
    folder = tmp_path / ("very" * 20) / ("long" * 20)
    folder.parent.mkdir()
    family = small_family().copied(folder)
    lines = ran(family.recipe(), tmp_path).output.splitlines()
    table = [line for line in lines if "%" in line and "unchanged in every" not in line]
    assert max(map(len, table)) <= 100
    assert any(line.startswith("1 …") and "long/a " in line for line in table)


def test_json(tmp_path: Path) -> None:
    result = ran(small_family().recipe(), tmp_path, "--json")
    content = json.loads(result.output)
    assert (content["schema"], content["command"], content["method"]) == (1, "inspect", RESAMPLING)
    assert content["pairs"] == [[0, 1], [0, 2], [1, 2]]
    assert len(content["tensors"]) == content["total"]["counts"]["tensors"] == 21
    assert [group["layer"] for group in content["layers"]] == ["model.layers.0", "model.layers.1", None]
    shares = content["total"]["shares"]
    assert sum(shares["chosen"]) + shares["left"] == pytest.approx(1)
    assert shares["expected"] == pytest.approx([1 / 3] * 3)


def test_values_that_json_lacks(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    tensors = tensors_of(family.subs[0])
    tensors["model.norm.weight"][0] = float("nan")
    save(family.subs[0], tensors)
    recipe = family.recipe()
    content = json.loads(ran(recipe, tmp_path, "--json").output)
    assert content["total"]["norms"]["task_vector"][0] is None
    assert "nan" in ran(recipe, tmp_path).output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_real_process_on_a_full_disk(tmp_path: Path) -> None:
    done = to_full_disk("inspect", written(tmp_path / "recipe.yml", small_family().recipe()))
    assert done.returncode == 2
    assert done.stderr == "Error: cannot write the report to stdout: No space left on device\n"
