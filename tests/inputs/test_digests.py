"""Files are hashed side by side, each once, and whoever stops does not wait for gigabytes."""

from __future__ import annotations

import _thread
import hashlib
import os
import threading
from pathlib import Path

import pytest

from mergekit_select.errors import UnreadableError
from mergekit_select.inputs import digests
from mergekit_select.inputs.digests import Digests, folder_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        (tmp_path / f"{number}.bin").write_bytes(bytes([number]) * (number * 1000 + 1))
        os.utime(tmp_path / f"{number}.bin", (1, 1))
    return tmp_path


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("chunk", [1, 999, 1 << 20])
def test_a_folder_has_the_digests_of_its_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, keep: bool
) -> None:
    monkeypatch.setattr(digests, "_CHUNK", chunk)
    counted: list[int] = []
    paths = sorted(folder.iterdir())
    found = Digests(progress=counted.append).of_all(paths, keep=keep)
    assert [each["sha256"] for each in found] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert sum(counted) == sum(path.stat().st_size for path in paths)


def test_what_is_hashed_ahead_is_not_hashed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks while a file is hashed waits for it; times of the files are old enough to be trusted."""
    hashed: list[Path] = []
    begun, go_on = threading.Event(), threading.Event()

    def hash_(self: Digests, path: Path, size: int, keep: bool, do: object = Digests._hash) -> dict[str, str]:
        hashed.append(path)
        begun.set()
        assert go_on.wait(30)
        assert callable(do)
        result: dict[str, str] = do(self, path, size, keep)
        return result

    monkeypatch.setattr(Digests, "_hash", hash_)
    monkeypatch.setattr(digests, "_RECENT", -1.0)  # the time of change is that of the test
    shared = Digests()
    shared.ahead([folder, folder / "nowhere"])
    assert begun.wait(30)
    threading.Timer(0.2, go_on.set).start()
    files = folder_files(folder, shared)
    assert [file.path for file in files] == [f"{number}.bin" for number in range(5)]
    assert sorted(hashed) == sorted(folder.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(UnreadableError, match=r"pipe\.json must be a regular file"):
        folder_files(folder, Digests())


def test_closing_stops_what_was_begun(folder: Path) -> None:
    shared = Digests()
    shared.close()
    with pytest.raises(UnreadableError, match="stopped while hashing"):
        shared.of(folder / "4.bin")


def test_a_system_that_gives_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(_thread, "start_new_thread", refused)
    monkeypatch.setattr(threading, "_start_new_thread", refused)
    alone = Digests()
    alone.ahead([tmp_path])
    assert alone.of_all([tmp_path / "a"])[0]["sha256"] == hashlib.sha256(b"x").hexdigest()


def test_no_memory_for_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise MemoryError

    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(Digests, "_hash", refused)
    with pytest.raises(UnreadableError, match="a: there is not enough memory"):
        Digests().of_all([tmp_path / "a"])
