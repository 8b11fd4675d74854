"""``mergekit-select check``: its text, its JSON, its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import invoke, one_line, to_full_disk
from tests.support.models import Family
from tests.support.recipes import SELECTION, recipe, written


@pytest.mark.filterwarnings("ignore")
def test_check_prints_what_it_finds(llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llamas.base, "base")
    shutil.copytree(llamas.subs[0], "sub")
    config = recipe(SELECTION, "./base", ["./sub"], parameters={"wieght": 2, "normalize": True})
    result = invoke("check", written(tmp_path / "recipe.yml", config))
    assert result.stdout == (
        "error unknown-key at parameters.wieght: mergekit does not know the key wieght and silently ignores it "
        "(got 2); write weight\n"
        "warning unknown-key at parameters.normalize: mergekit silently ignores the key normalize here "
        "(got True); remove it, or see which method it belongs to\n"
        "reads 117.6 KB, writes 30 tensors, 58.8 KB; peak memory about 67.2 MB, at model.embed_tokens.weight\n"
        "this merge would not work: 1 error, 1 warning, 0 notes\n"
    )
    assert (result.exit_code, result.stderr) == (1, "")


@pytest.mark.filterwarnings("ignore")
def test_exit_codes_of_check(llamas: Family, tmp_path: Path) -> None:
    good = llamas.recipe(SELECTION)
    file = written(tmp_path / "recipe.yml", good)
    assert invoke("check", file, "--quiet").exit_code == 0
    assert invoke("check", file, "--strict").exit_code == 0
    written(tmp_path / "recipe.yml", good | {"parameters": {"normalize": True}})
    assert invoke("check", file).exit_code == 0
    assert invoke("check", file, "--strict").exit_code == 1
    written(tmp_path / "recipe.yml", good | {"parameters": {"weight": -1}})
    assert invoke("check", file, "--quiet").exit_code == 1


@pytest.mark.filterwarnings("ignore")
def test_json_of_check_has_a_schema_version(llamas: Family, tmp_path: Path) -> None:
    file = written(tmp_path / "recipe.yml", recipe("linear", None, llamas.subs))
    result = invoke("check", file, tmp_path / "out", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (report["schema"], report["command"], report["ok"]) == (1, "check", False)
    errors = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert errors[0].keys() == {"kind", "severity", "place", "value", "message", "remedy"}
    assert errors[0]["kind"] == "parameter-missing"
    assert report["costs"][0]["bytes_free"] > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_report_of_check_that_cannot_be_written(llamas: Family, tmp_path: Path, arguments: list[str]) -> None:
    file = written(tmp_path / "recipe.yml", llamas.recipe(SELECTION))
    done = to_full_disk("check", file, *arguments)
    assert done.returncode == 2
    assert done.stderr == "Error: cannot write the report to stdout: No space left on device\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"\x93NUMPY\xff\xfe", "must be UTF-8 text"),
        (b"a: [1, 2", "must be YAML"),
        (b"a: \x00", "must be YAML"),
        (b"- a\n- b\n", "must be a YAML mapping"),
        (b"just words", "must be a YAML mapping"),
        (b"models: []\n", "must say merge_method"),
        (b"x" * (5 << 20), "must have at most 1048576 bytes"),
        (b"[" * 5000, "at most 50 levels"),
    ],
)
def test_a_file_that_is_no_recipe_gives_one_line_and_2(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    if content is not None:
        file.write_bytes(content)
    result = invoke("check", file)
    one_line(result, 2, says)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert str(file) in result.stderr


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    result = invoke("check", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: cannot read the recipe: cannot read {tmp_path}: Is a directory\n"
