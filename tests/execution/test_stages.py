"""The merges of a mergekit-multi file: the folders that mergekit-multi writes, each kept once it is finished."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mergekit.scripts.multimerge import main as multi

from mergekit_select.execution import work
from tests.support.commands import invoke, one_line
from tests.support.recipes import RESAMPLING, SELECTION, recipe, written


@pytest.fixture
def file(llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages, the first in the file needing the second, and what is made of both."""
    monkeypatch.chdir(tmp_path)
    base, (one, two, *_) = str(llamas.base), map(str, llamas.subs)
    again = {"name": "again", **recipe(RESAMPLING, base, ["average", one])}
    average = {"name": "average", **recipe("linear", None, [one, two], parameters={"weight": 1})}
    return written(tmp_path / "m.yml", again, average, recipe(SELECTION, base, ["again", "average", two]))


def merged(*arguments: object) -> dict[str, Any]:
    ran = invoke("merge", "m.yml", "out", "-I", "./parts", "--jobs", 1, "--quiet", "--json", *arguments)
    assert ran.exit_code == 0, ran.output
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def files(folder: Path) -> dict[str, bytes]:
    """Return what mergekit writes; it lists a card's models in the order of a set."""
    names = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith("merge_")]
    return {
        path.name: b"\n".join(sorted(path.read_bytes().split(b"\n"))) if path.name == "README.md" else path.read_bytes()
        for path in names
    }


def test_the_folders_of_mergekit_multi(file: Path, tmp_path: Path) -> None:
    assert merged()["folders"] == ["parts/average", "parts/again", "out"]
    ours = {name: files(tmp_path / name) for name in ("parts/average", "parts/again", "out")}
    for name in ours:
        verified = invoke("verify", name)
        assert verified.exit_code == 0, verified.output
    for name in ours:
        (tmp_path / name).rename(tmp_path / f"ours-{Path(name).name}")
    CliRunner().invoke(
        multi, ["m.yml", "-I", "./parts", "--out-path", "out", "--quiet"], catch_exceptions=False, standalone_mode=False
    )
    for name, content in ours.items():
        assert content == files(tmp_path / name), name


def test_finished_merges_are_kept(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []

    def failing(job: Any, tensor: Any, do: Any = work._computed) -> Any:
        computed.append(job.request.out)
        if job.request.out == "out" and len(computed) % 10 == 0:
            raise KeyboardInterrupt
        return do(job, tensor)

    monkeypatch.setattr(work, "_computed", failing)
    assert invoke("merge", "m.yml", "out", "-I", "parts", "--jobs", 1, "--quiet").exit_code == 130
    assert set(computed) == {"parts/average", "parts/again", "out"}
    assert not Path("out", "config.json").exists()
    computed.clear()
    monkeypatch.setattr(work, "_computed", lambda job, tensor, do=failing.__defaults__[0]: do(job, tensor))  # type: ignore[index]
    kept = (tmp_path / "parts" / "again" / "model.safetensors").stat().st_mtime_ns
    merged()
    assert (tmp_path / "parts" / "again" / "model.safetensors").stat().st_mtime_ns == kept
    for folder in ("parts/average", "parts/again", "out"):
        assert Path(folder, "merge_provenance.json").exists()
    assert merged()["finished"]


def test_shares_go_through_one_merge_after_the_other(file: Path) -> None:
    small = ("--out-shard-size", 16_000)
    first = merged("--shard", "1/2", *small)
    assert first["folders"] == ["parts/average"]
    assert not first["finished"]
    second = merged("--shard", "2/2", *small)
    assert second["folders"] == ["parts/average", "parts/again"]
    for number in (1, 1, 2):
        last = merged("--shard", f"{number}/2", *small)
    assert last["finished"]


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (("- model: average", "- model: again"), 1, "must not need each other: again needs again"),
        (("name: average", "name: again"), 2, "mergekit refuses the recipe m.yml: "),
        (("merge_method: linear", "merge_method: 5"), 2, "mergekit refuses the recipe m.yml: "),
        (("name: average", "name: ../average"), 2, "'../average' in m.yml leads out of it; call it otherwise"),
        (("name: average", "name: 1"), 2, "the name of a merge must be text, and 1 in m.yml is not; quote it"),
        (("name: average", "name: /average"), 2, "'/average' in m.yml leads out of it; call it otherwise"),
    ],
)
def test_bad_files(file: Path, change: tuple[str, str], code: int, text: str) -> None:
    file.write_text(file.read_text().replace(*change, 1))
    one_line(invoke("merge", "m.yml", "out", "-I", "parts", "--quiet"), code, text)
    assert not Path("out", "config.json").exists()


def test_keys_that_mergekit_ignores_are_told(file: Path) -> None:
    file.write_text(file.read_text().replace("name: average", "name: average\nsed: 3"))
    ran = invoke("merge", "m.yml", "out", "-I", "parts", "--quiet", "--jobs", 1, "--json")
    assert ran.exit_code == 0, ran.output
    said = "warning unknown-key at average: sed: mergekit silently ignores the key sed here (got 3)"
    assert ran.stderr.startswith(said)
    assert [note.startswith(said) for note in json.loads(ran.stdout)["notes"]] == [True]


def test_no_merge_for_the_output(file: Path) -> None:
    file.write_text(file.read_text().rpartition("---")[0])
    one_line(invoke("merge", "m.yml", "out", "-I", "parts", "--quiet"), 1, "must have a merge without a name")


def test_several_merges_and_no_folder_for_them(file: Path) -> None:
    one_line(invoke("merge", "m.yml", "out", "--jobs", 1, "--quiet"), 1, "holds 3 merges; give --intermediate-dir DIR")


def test_a_folder_that_cannot_be_made(file: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").write_text("")
    one_line(
        invoke("merge", "m.yml", "out", "-I", "parts", "--quiet"), 2, "cannot write parts/average/.merge/recipe.yml"
    )


@pytest.mark.slow
def test_two_processes(file: Path) -> None:
    program = [sys.executable, "-m", "mergekit_select.cli", "merge", "m.yml", "two", "-I", "two-parts", "--jobs", "2"]
    subprocess.run([*program, "--quiet"], check=True)
    merged()
    for name in ("average", "again"):
        left, right = files(Path("parts", name)), files(Path("two-parts", name))
        assert left["model.safetensors"] == right["model.safetensors"]
