"""``mergekit-select inspect --plot``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.inspection.support import ran
from tests.support.models import small_family
from tests.support.recipes import RESAMPLING, SELECTION


@pytest.mark.parametrize(
    ("method", "suffix", "magic"),
    [
        (RESAMPLING, "png", b"\x89PNG"),
        (RESAMPLING, "svg", b"<?xml"),
        (SELECTION, "PDF", b"%PDF"),
        ("linear", "png", b"\x89PNG"),
    ],
)
def test_file(tmp_path: Path, method: str, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    recipe = small_family().recipe(method, parameters={"weight": 1})
    path = tmp_path / f"picture.{suffix}"
    assert ran(recipe, tmp_path, "--plot", path).exit_code == 0
    assert path.read_bytes().startswith(magic)
    if suffix == "svg":
        text = path.read_text()
        for words in ("left at the base", "self_attn.q_proj", "layer", "kind of module"):
            assert f"<!-- {words}" in text


def test_many_layers_stand_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recipe = small_family(layers=18).recipe()
    path = tmp_path / "picture.png"
    assert ran(recipe, tmp_path, "--plot", path).exit_code == 0
    width, height = (int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert width > 2 * height


def test_without_a_base_or_layers_that_agree(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    family = small_family()
    recipe = {"merge_method": "passthrough", "models": [{"model": str(family.subs[0])}]}
    assert ran(recipe, tmp_path, "--plot", tmp_path / "p.png").exit_code == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("picture.txt", "--plot must name a file that ends in .png, .svg or .pdf"),
        ("picture", "--plot must name a file that ends in"),
        ("no/folder.png", "--plot must name a file in a folder that is there"),
    ],
)
def test_name_that_cannot_be_written(tmp_path: Path, name: str, text: str) -> None:
    pytest.importorskip("matplotlib")
    result = ran(small_family().recipe(), tmp_path, "--plot", str(tmp_path / name))
    assert result.exit_code == 2
    assert text in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_full_disk(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "full.png").symlink_to("/dev/full")
    recipe = small_family().recipe()
    result = ran(recipe, tmp_path, "--plot", tmp_path / "full.png")
    assert result.exit_code == 2
    assert "cannot write the picture" in result.output
    assert "No space left on device" in result.output
    assert len(result.output.splitlines()) == 1


def test_matplotlib_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    recipe = small_family().recipe()
    result = ran(recipe, tmp_path, "--plot", tmp_path / "p.png")
    assert result.exit_code == 2
    assert result.output == "Error: --plot needs matplotlib; install it with: pip install matplotlib\n"
