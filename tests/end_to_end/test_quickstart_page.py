"""docs/quickstart.md, followed to the letter on small models; and the site is built from the pages it should have."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.checkpoints import copied
from tests.support.models import small_family
from tests.support.pages import ROOT, blocks, commands, typed

PAGE = "docs/quickstart.md"


def test_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, trained in zip(("base", "order-1", "order-2", "order-3"), small_family().everyone, strict=True):
        copied(trained, tmp_path / "models" / name)
    (recipe,) = blocks(PAGE, "yaml")
    Path("select.yml").write_text(recipe, encoding="utf-8")
    install, *others = commands(PAGE)
    assert install == "pip install ."
    checked, _, verified, _ = map(typed, others)
    assert checked.splitlines()[-1].startswith("this merge would work: 0 errors, ")
    assert verified.startswith("SAME")


def test_the_quickstart_and_the_readme_name_the_same_models() -> None:
    written = [yaml.safe_load(block)["models"] for block in blocks(PAGE, "yaml")]
    assert written == [yaml.safe_load((ROOT / "recipes" / "select.yml").read_text())["models"]]


def test_the_example_on_the_python_page() -> None:
    (code,) = blocks("docs/api.md", "python")
    names: dict[str, Any] = {}
    exec(f"import mergekit_select.methods\n{code}", names)
    assert names["merged"].keys() == {"weight", "bias"}


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([\w-]+\.md)$", text, re.MULTILINE)) & {page.name for page in (ROOT / "docs").iterdir()}
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "training" / "index.html").exists()
