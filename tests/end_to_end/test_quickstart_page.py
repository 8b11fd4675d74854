"""docs/quickstart.md, followed to the letter on small models; and the site is built from the pages it should have."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_select.cli import main
from tests.support.checkpoints import copied
from tests.support.models import small_family

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, trained in zip(("base", "order-1", "order-2", "order-3"), small_family().everyone, strict=True):
        copied(trained, tmp_path / "models" / name)
    (recipe,) = blocks("yaml")
    Path("select.yml").write_text(recipe, encoding="utf-8")
    answers = {}
    for command in blocks("sh"):
        program, *arguments = shlex.split(command)
        if program == "mergekit-select":
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, result.output
            answers[arguments[0]] = result.stdout
        elif program == "mergekit-yaml":
            start = "import mergekit_select.methods; from mergekit.scripts.run_yaml import main; main()"
            subprocess.run([sys.executable, "-c", start, *arguments], check=True, capture_output=True, text=True)
        else:
            assert command == "pip install .\n"
    assert answers.keys() == {"check", "verify", "inspect"}
    assert answers["check"].splitlines()[-1].startswith("this merge would work")
    assert answers["verify"].startswith("SAME")


def test_the_quickstart_and_the_readme_name_the_same_models() -> None:
    written = [yaml.safe_load(block)["models"] for block in blocks("yaml")]
    assert written == [yaml.safe_load((ROOT / "recipes" / "select.yml").read_text())["models"]]


def test_the_example_on_the_python_page() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
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
