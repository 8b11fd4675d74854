"""The command merge: what it prints, its exit codes, and what it refuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Process
from pathlib import Path

import pytest

from mergekit_select.execution import local
from mergekit_select.execution.job import Job, opened_job
from mergekit_select.execution.layout import Part
from mergekit_select.execution.request import Request
from mergekit_select.execution.work import work
from mergekit_select.provenance import read_record
from mergekit_select.verification import verify
from tests.support.checkpoints import changed, digests
from tests.support.commands import invoke, one_line
from tests.support.models import Family, write_tokenizer
from tests.support.recipes import recipe as recipe_of
from tests.support.recipes import written


@pytest.fixture
def recipe(llamas: Family, tmp_path: Path) -> Path:
    return written(tmp_path / "recipe.yml", llamas.recipe())


def test_shares_then_the_whole(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["merge", recipe, out, "--jobs", "1", "--out-shard-size", "4000", "--json"]
    first = json.loads(invoke(*arguments, "--shard", "1/2").stdout)
    assert (first["ok"], first["finished"], first["jobs"]) == (True, False, 1)
    assert first["missing"] > 0
    done = invoke("merge", recipe, out, "--jobs", "1", "--out-shard-size", "4000")
    assert (done.exit_code, done.stdout) == (0, f"{out}: finished, with 1 process\n")
    assert verify(out).same


def test_finish(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("merge", recipe, out, "--out-shard-size", "4000", "--quiet")
    assert invoke(*arguments, "--shard", "1/2").exit_code == 0
    one_line(invoke(*arguments, "--finish"), 1, "cannot be finished: ")
    assert invoke(*arguments, "--shard", "2/2").exit_code == 0  # the last share finishes by itself
    assert invoke(*arguments, "--finish").exit_code == 0
    assert verify(out).same


def test_stopped_for_another_command(recipe: Path, tmp_path: Path) -> None:
    invoke("merge", recipe, tmp_path / "out", "--jobs", "1", "--out-shard-size", "4000", "--shard", "1/2")
    again = invoke("merge", recipe, tmp_path / "out", "--jobs", "1")
    one_line(again, 1, "holds an unfinished merge of another plan: the option out_shard_size was 4000, is 5000000000")


def test_an_interrupt_says_that_the_same_command_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("merge", recipe, out, "--jobs", "1", "--out-shard-size", "4000", "--quiet")

    def interrupted(job: Job, parts: Sequence[Part], progress: Callable[[], None]) -> None:
        work(job, parts[:1], progress)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr("mergekit_select.execution.work.work", interrupted)
        stopped = invoke(*arguments)
    one_line(stopped, 130, "interrupted; the parts that are finished are kept, and the same command merges the rest")
    (kept,) = (out / ".merge").rglob("*.safetensors")
    identity = kept.stat().st_ino
    assert invoke(*arguments).exit_code == 0
    assert identity in {file.stat().st_ino for file in out.glob("*.safetensors")}
    assert verify(out).same


def test_more_shares_than_files_leave_the_folder_to_any_other_merge(recipe: Path, tmp_path: Path) -> None:
    refused = invoke("merge", recipe, tmp_path / "out", "--shard", "1/4")
    one_line(refused, 1, "give a smaller N, or a smaller --out-shard-size")
    assert invoke("merge", recipe, tmp_path / "out", "--shard", "1/4", "--out-shard-size", "4000").exit_code == 0


@pytest.mark.parametrize("stages", [False, True])
def test_a_recipe_that_is_edited_while_it_is_planned(
    llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: bool
) -> None:
    """The record would be of the new recipe, and the tensors of the old one."""
    monkeypatch.chdir(tmp_path)
    file, more = written(tmp_path / "r.yml", llamas.recipe()), ("-I", "./stages") if stages else ()

    @contextmanager
    def edited(request: Request) -> Iterator[Job]:
        with opened_job(request) as opened:
            file.write_text(file.read_text() + "# edited")
            yield opened

    monkeypatch.setattr("mergekit_select.execution.job.opened_job", edited)
    one_line(
        invoke("merge", file, "out", "--jobs", "1", "--quiet", *more), 2, "has changed while the merge was planned"
    )
    assert not Path("out", "config.json").exists()


@pytest.mark.parametrize("out", ["first+second", "me@work"])
def test_a_union_of_tokenizers_into_a_folder_that_reads_like_a_reference(
    llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "me"):
        write_tokenizer(tmp_path / name, size=10)
    union = {**recipe_of("linear", None, llamas.subs, parameters={"weight": 1}), "tokenizer": {"source": "union"}}
    assert invoke("merge", written(tmp_path / "r.yml", union), out, "--jobs", "1").exit_code == 0
    assert verify(Path(out)).same


@pytest.mark.parametrize(("free", "started"), [(1 << 50, 128), (3 << 30, 3), (0, 1)])
def test_no_more_processes_than_there_is_memory_for(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, started: int
) -> None:
    """On 128 cores, and an output of more files than that; processes begin before it is known what there is to do."""
    begun: list[int] = []

    def count(_: object, number: int, jobs: int | None) -> Process:
        begun.append(number)
        process = Process(target=print)
        process.start()
        return process

    monkeypatch.setattr(local, "cores", lambda: 128)
    monkeypatch.setattr(local, "free_memory", lambda: free)
    monkeypatch.setattr(local, "_start_helper", count)
    assert invoke("merge", recipe, tmp_path / "out", "--out-shard-size", "1").exit_code == 0
    parts = len([*(tmp_path / "out").glob("*.safetensors")])
    assert len(begun) + 1 == min(started, parts)


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_shares_that_are_none(recipe: Path, tmp_path: Path, share: str) -> None:
    result = invoke("merge", recipe, tmp_path / "out", "--shard", share)
    assert result.exit_code == 2
    assert f"must be k/N with 1 <= k <= N, such as 1/4, got '{share}'" in result.stderr


def test_ray_decides_itself(recipe: Path, tmp_path: Path) -> None:
    result = invoke("merge", recipe, tmp_path / "out", "--ray", "auto", "--jobs", "2")
    assert result.exit_code == 2
    assert "--ray decides itself who merges what" in result.stderr


def test_processes_and_their_memory_are_told_before_they_start(recipe: Path, tmp_path: Path) -> None:
    told = invoke("merge", recipe, tmp_path / "out", "--jobs", "2").stderr
    assert "2 processes of 1.0 GiB at most" in told
    assert "GiB" not in invoke("merge", recipe, tmp_path / "quiet", "--jobs", "2", "--quiet").stderr


def test_the_record_holds_what_was_computed_and_a_later_change_is_not_recorded(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("merge", recipe, out, "--jobs", "1", "--quiet")
    assert invoke(*arguments).exit_code == 0
    kept = read_record(out)
    assert kept is not None
    assert {name: entry.sha256 for name, entry in kept[1].tensors.items()} == digests(out)
    changed(out, lambda tensors: tensors["model.norm.weight"].add_(1))
    one_line(invoke(*arguments), 2, "model.safetensors must be as the merge left it, and is not")
    assert read_record(out) == kept
    assert not verify(out).same


def test_windows_has_no_such_locks(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    one_line(invoke("merge", recipe, tmp_path / "out"), 1, "use mergekit-yaml, or WSL")
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_none(recipe: Path, tmp_path: Path) -> None:
    result = invoke("merge", recipe, tmp_path / "out", "--out-shard-size", "much")
    assert result.exit_code == 2
    assert "'much' is not a size; write one such as 5B, 500M or 1000000" in result.stderr


def test_a_path_that_is_mapped_twice(tmp_path: Path) -> None:
    result = invoke("verify", tmp_path, "--map", "./a=./b", "--map", "./a=./c")
    assert result.exit_code == 2
    assert "maps './a' twice, to './b' and './c'" in result.stderr
