"""``recipes``: the list and each recipe are those of the repository's one folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.support.commands import invoke

FILES = sorted((Path(__file__).parents[2] / "recipes").iterdir())
NAMES = [file.stem for file in FILES]


def test_every_recipe_is_listed_with_its_method_and_idea() -> None:
    result = invoke("recipes")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    for line, file in zip(lines, FILES, strict=True):
        text = file.read_text("utf-8")
        assert line.endswith(text.splitlines()[0].removeprefix("#"))
        assert all(recipe["merge_method"] in line for recipe in yaml.safe_load_all(text))


def test_the_list_as_json() -> None:
    report = json.loads(invoke("recipes", "--json").stdout)
    assert (report["schema"], report["command"]) == (1, "recipes")
    assert [recipe["name"] for recipe in report["recipes"]] == NAMES
    assert {recipe["name"]: recipe["method"] for recipe in report["recipes"]}[
        "two-stage"
    ] == "parameter_selection, ties"
    assert all(recipe.keys() == {"name", "method", "idea"} for recipe in report["recipes"])


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_recipe_is_shown_as_it_lies_in_the_repository(file: Path) -> None:
    text = file.read_text("utf-8")
    assert invoke("recipes", "show", file.stem).stdout == text
    assert json.loads(invoke("recipes", "show", file.stem, "--json").stdout)["text"] == text


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    result = invoke("recipes", "show", "selct")
    assert result.exit_code == 2
    assert all(name in result.stderr for name in NAMES)
