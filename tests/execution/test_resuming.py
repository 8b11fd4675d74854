"""Whatever stops a merge, the same command goes on, and nothing looks finished before it is."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_select import bits
from mergekit_select.errors import MergekitSelectError, PlanError, UnreadableError
from mergekit_select.execution import local, work
from mergekit_select.execution.local import Outcome, merge
from mergekit_select.execution.request import Request
from tests.support.checkpoints import copied
from tests.support.commands import invoke
from tests.support.recipes import merge as merge_stock

SIZE = 4_000  # bytes of a file, which make a dozen of the small Llama
POINTS = 20


def write_recipe(folder: Path, llamas: Any, **changes: Any) -> Path:
    file = folder / "recipe.yml"
    models = [{"model": str(model)} for model in llamas.subs]
    config = {"merge_method": "parameter_selection", "base_model": str(llamas.base), "models": models, **changes}
    file.write_text(yaml.safe_dump(config))
    return file


def begun(file: Path, out: Path, share: tuple[int, int] | None = None, **options: Any) -> Outcome:
    return merge(Request(str(file), str(out), {"out_shard_size": SIZE, **options}, share), jobs=1)


def files_of(folder: Path) -> dict[str, bytes]:
    names = (
        path for path in folder.iterdir() if path.is_file() and path.name not in ("README.md", "mergekit_config.yml")
    )
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def stock(llamas: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("stock")
    return files_of(
        merge_stock(yaml.safe_load(write_recipe(folder, llamas).read_text()), folder / "out", out_shard_size=SIZE)
    )


@pytest.mark.slow
def test_killed_at_twenty_points(llamas: Any, tmp_path: Path, stock: dict[str, bytes]) -> None:
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    driver = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(file), str(out), str(POINTS), str(SIZE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["calls"] > 2 * POINTS
    assert len({point["call"] for point in answer["killed"]}) == POINTS
    for number, point in enumerate(answer["killed"]):
        assert point["code"] == -signal.SIGKILL
        if "config.json" in point["names"]:  # from then on it is finished in truth
            assert {*stock} <= {*point["names"]}
        assert point["resumed"] == 0
        assert files_of(tmp_path / f"out-{number}") == stock
    assert any(
        "config.json" not in point["names"] and any(n.startswith("model") for n in point["names"])
        for point in answer["killed"]
    )
    assert answer["kills"] > 3
    assert answer["end"] == 0
    assert files_of(out) == stock


def test_what_is_recorded_is_not_computed_again(llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    assert not begun(file, out, (1, 2)).finished
    computed: list[str] = []

    def counting(job: Any, tensor: Any, do: Any = work._computed) -> Any:
        computed.append(tensor.planned.name)
        return do(job, tensor)

    monkeypatch.setattr(work, "_computed", counting)
    outcome = begun(file, out, (2, 2))
    assert outcome.finished
    tensors = json.loads((out / ".merge" / "tensors.json").read_text())
    assert 0 < len(computed) < len(tensors)
    computed.clear()
    assert begun(file, out).finished
    assert not computed


def test_shares_in_any_order(llamas: Any, tmp_path: Path, stock: dict[str, bytes]) -> None:
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    outcomes = [begun(file, out, (number, 3)) for number in (3, 1, 2)]
    assert [outcome.finished for outcome in outcomes] == [False, False, True]
    assert files_of(out) == stock


def test_more_shares_than_files(llamas: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"needs an output of at least N files, and this one has \d+ for N = 1000"):
        begun(write_recipe(tmp_path, llamas), tmp_path / "out", (1, 1000))


def test_finish_tells_what_is_missing(llamas: Any, tmp_path: Path) -> None:
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    begun(file, out, (1, 2))
    with pytest.raises(PlanError, match=r"cannot be finished: \d+ of \d+ parts are missing"):
        merge(Request(str(file), str(out), {"out_shard_size": SIZE}), only_finish=True)


def test_rehash_finds_damage(llamas: Any, tmp_path: Path, stock: dict[str, bytes]) -> None:
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    begun(file, out, (1, 2))
    damaged, cut, header, *_ = sorted((out / ".merge" / "files").iterdir())
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    header.write_bytes(b"?" + header.read_bytes()[1:])
    outcome = merge(Request(str(file), str(out), {"out_shard_size": SIZE}), jobs=1, rehash=True)
    assert outcome.notes == ("3 parts were recorded, and not there or damaged: computed again",)
    assert files_of(out) == stock


def test_a_lost_file_is_made_again(llamas: Any, tmp_path: Path, stock: dict[str, bytes]) -> None:
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    begun(file, out, (1, 2))
    sorted((out / ".merge" / "files").iterdir())[0].unlink()
    assert begun(file, out).notes
    assert files_of(out) == stock


def test_a_helper_dies(llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: dict[str, bytes]) -> None:
    def dying(*_: Any) -> Any:
        process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(9,))
        process.start()
        process.join()
        return process

    monkeypatch.setattr(local, "_start_helper", dying)
    request = Request(str(write_recipe(tmp_path, llamas)), str(tmp_path / "out"), {"out_shard_size": SIZE})
    outcome = merge(request, jobs=2)
    assert outcome.notes == ("1 of 2 processes ended early (exit code 9); the others went on",)
    assert files_of(tmp_path / "out") == stock


def test_full_disk(llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: dict[str, bytes]) -> None:
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    room = 5

    def pwrite(*arguments: Any, do: Any = os.pwrite) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(do(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(
            UnreadableError, match="No space left on device; once that is mended, the same command goes on"
        ):
            begun(file, out)
    assert not (out / "config.json").exists()
    assert begun(file, out).finished
    assert files_of(out) == stock


@contextmanager
def locked_elsewhere(out: Path) -> Iterator[None]:
    lock = str(out / ".merge" / "lock")
    code = f"import fcntl, os; f = os.open({lock!r}, os.O_RDWR); fcntl.lockf(f, fcntl.LOCK_EX, 1, 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('locked', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdout.readline()
        yield
        process.stdin.write(b"\n")


def test_a_second_process_is_refused(llamas: Any, tmp_path: Path) -> None:
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    begun(file, out, (1, 2))
    with locked_elsewhere(out):
        for share in (None, (2, 2)):
            with pytest.raises(PlanError, match=r"another process is merging .* into .*; wait for it, or stop it"):
                begun(file, out, share)
    assert begun(file, out).finished


@pytest.mark.parametrize("what", ["recipe", "option", "input"])
def test_another_plan_is_refused(llamas: Any, tmp_path: Path, what: str) -> None:
    own = copied(llamas.base, tmp_path / "own")
    changes = {"base_model": str(own)}
    file, out = write_recipe(tmp_path, llamas, **changes), tmp_path / "out"
    begun(file, out, (1, 2))
    options: dict[str, Any] = {}
    if what == "recipe":
        write_recipe(tmp_path, llamas, parameters={"seed": 1}, **changes)
    elif what == "option":
        options = {"write_model_card": False}
    else:
        os.utime(own / "model.safetensors", (1, 1))
    text = {
        "recipe": "its recipe has another text",
        "option": "the option write_model_card was True, is False",
        "input": f"the input file {own}/model.safetensors has changed since",
    }[what]
    with pytest.raises(PlanError, match=f"holds an unfinished merge of another plan: {text}; give what"):
        begun(file, out, **options)


@pytest.mark.parametrize("restored", [False, True])
def test_an_input_that_changes_during_the_merge(
    llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    own = copied(llamas.base, tmp_path / "own")
    file, out = write_recipe(tmp_path, llamas, base_model=str(own)), tmp_path / "out"
    before = (own / "model.safetensors").stat()

    def touching(tensor: torch.Tensor, do: Any = bits.digest) -> str:
        times = (before.st_atime_ns, before.st_mtime_ns) if restored else (1, 1)
        os.utime(own / "model.safetensors", ns=times)  # as a tool that copies does
        return str(do(tensor))

    monkeypatch.setattr(work, "digest", touching)
    with pytest.raises(UnreadableError, match=r"own/model.safetensors has changed during the merge"):
        begun(file, out)
    assert not any((out / ".merge" / "parts").iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"])
def test_another_model_in_the_folder(llamas: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    with pytest.raises(PlanError, match=f"must hold no other model, and holds {name}; remove it"):
        begun(write_recipe(tmp_path, llamas), tmp_path / "out")


def test_verify_knows_an_unfinished_merge(llamas: Any, tmp_path: Path) -> None:
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    assert not begun(file, out, (1, 2)).finished
    ran = invoke("verify", out)
    assert ran.exit_code == 1, ran.output
    assert "unfinished: .merge: the merge has not ended; give the same merge command again" in ran.output


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_dtype_that_mergekit_does_not_know(llamas: Any, tmp_path: Path, dtype: str) -> None:
    with pytest.raises(PlanError, match=f"^dtype must be a floating dtype .* write bfloat16, .*, got '{dtype}'$"):
        begun(write_recipe(tmp_path, llamas, dtype=dtype), tmp_path / "out")


def test_another_model_in_the_folder_of_an_unfinished_merge(llamas: Any, tmp_path: Path) -> None:
    """Its files may be called as this merge's are; they must not be written into, nor replaced."""
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"
    assert not begun(file, out, (1, 2)).finished
    other = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": str(llamas.subs[0])}]}
    merge_stock(other, out, out_shard_size=SIZE)
    before = files_of(out)
    for share in (None, (2, 2)):
        with pytest.raises(PlanError, match="must hold no other model, and holds config"):
            begun(file, out, share)
    assert files_of(out) == before
    for name in before:
        (out / name).unlink()
    assert begun(file, out).finished


def test_a_card_that_cannot_be_written_is_told_before_the_tensors(
    llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit asks the hub whether a local path with one slash is a model there, and tests are offline."""
    monkeypatch.chdir(tmp_path)
    copied(llamas.subs[0], Path("runs/a"))
    file = write_recipe(tmp_path, llamas, models=[{"model": "runs/a"}])
    with pytest.raises(PlanError, match=r"cannot write the model card: .*; write \./ before paths of local models"):
        begun(file, tmp_path / "out")
    assert not list(Path("out").rglob("*.safetensors"))
    assert begun(file, tmp_path / "out", write_model_card=False).finished
    assert begun(write_recipe(tmp_path, llamas, models=[{"model": "./runs/a"}]), tmp_path / "other").finished


def test_a_tokenizer_that_does_not_fit(
    llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: dict[str, bytes]
) -> None:
    """Stock mergekit goes on, and exits with 0."""
    file, out = write_recipe(tmp_path, llamas), tmp_path / "out"

    def copyfile(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tokenizer.json")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copyfile)
        with pytest.raises(UnreadableError, match=r"model card: No space left on device: tokenizer\.json"):
            begun(file, out)
    assert not (out / "config.json").exists()
    assert begun(file, out).finished
    assert files_of(out) == stock


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/" * 3000])
def test_a_folder_that_cannot_have_this_name(llamas: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(UnreadableError, match=r"cannot write to the output folder .*: (File name too|embedded null)"):
        begun(write_recipe(tmp_path, llamas), tmp_path / name)


def test_a_limit_on_the_size_of_files_stops_the_plan(
    llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_descriptor: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UnreadableError, match=r"cannot write .*plan\.json: File too large; once that is mended"):
        begun(write_recipe(tmp_path, llamas), tmp_path / "out")


def test_a_folder_that_cannot_be_made(llamas: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MergekitSelectError, match=r"cannot write to the output folder .*: Not a directory"):
        begun(write_recipe(tmp_path, llamas), tmp_path / "file" / "out")
