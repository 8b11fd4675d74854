"""The folder ``OUT/.merge``: plan, unfinished files, records and locks, written so that a power cut cannot fool it.

What is said to be there is there: a file's bytes are on the disk before its name is, and a part's bytes before its
record.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_select.errors import UnreadableError
from mergekit_select.inputs.files import WORKSPACE, names_in, read_json, sync, write_whole

# Bytes of the lock file, each of which is locked for something. No byte needs to be there to be locked, and the system
# unlocks what a process had locked when it dies.
WHOLE, PLANNING, FINISHING = 0, 1, 2
_SHARES, _PARTS = 1 << 20, 1 << 40


class Workspace:
    """What a merge keeps until it is finished, and the little that it leaves.

    Args:
        out: The output folder.

    Attributes:
        out: The output folder.
        files: Where the output's files grow.
        union: The tokenizer of a union, built once.
        staging: Where what stands beside the tensors is written.

    Raises:
        UnreadableError: The folder cannot be made or written to.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        root = out / WORKSPACE
        self.files, self.union, self.staging = root / "files", root / "tokenizer", root / "finish"
        self._records, self._plan, self._digests = root / "parts", root / "plan.json", root / "tensors.json"
        self._working = (self._records, self.files, self.staging, self.union)  # gone once the merge is finished
        self._beside, self._kept = root / "beside.json", root / "files.json"
        try:
            root.mkdir(parents=True, exist_ok=True)
            # A process's locks on a file end when it closes the file once: it stays open, and is opened nowhere else.
            self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise UnreadableError(f"cannot write to the output folder {out}: {_reason(error)}") from error

    def close(self) -> None:
        """Give back all locks."""
        os.close(self._lock)

    # Locks

    @contextmanager
    def locked(self, what: int, shared: bool = False, wait: bool = False) -> Iterator[bool]:
        """Hold a lock in a block; False where another process has it."""
        held = self.acquire(what, shared, wait)
        try:
            yield held
        finally:
            if held:
                self.release(what)

    def acquire(self, what: int, shared: bool = False, wait: bool = False) -> bool:
        """Take a lock; False where another process has it."""
        operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self._lock, operation, 1, what)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise UnreadableError(
                f"the file system of {self.out} must have locks (POSIX, fcntl), and refuses them: {error.strerror}"
            ) from error
        return True

    def release(self, what: int) -> None:
        """Give a lock back."""
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, what)

    # Plan and records

    def read_plan(self) -> dict[str, Any] | None:
        """Return the plan that the folder is of, if it is of any."""
        return read_json(self._plan) if self._plan.exists() else None

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Make this the folder of a plan."""
        with writing(self._plan):
            self.files.mkdir(exist_ok=True)
            self._records.mkdir(exist_ok=True)
            write_whole(self._plan, json.dumps(plan, indent=1), durably=True)
            sync(self.out)

    def recorded(self) -> set[int]:
        """Return the numbers of the parts that are done."""
        try:
            names = (name.removesuffix(".json") for name in os.listdir(self._records) if name.endswith(".json"))
            return {int(name) for name in names if name.isdecimal()}  # some systems leave files of their own
        except FileNotFoundError:  # another process has finished the merge
            return set()

    def record(self, number: int, plan_id: str, digests: Mapping[str, str]) -> None:
        """Record that a part is done, once its bytes are on the disk."""
        path = self._record(number)
        with writing(path):
            write_whole(path, json.dumps({"plan_id": plan_id, "tensors": digests}, indent=1), durably=True)

    def digests(self, number: int) -> dict[str, str]:
        """Return the digests of a recorded part's tensors."""
        result: dict[str, str] = read_json(self._record(number))["tensors"]
        return result

    def forget(self, number: int) -> None:
        """Let a part be computed again."""
        with writing(self._record(number)):
            self._record(number).unlink()

    def _record(self, number: int) -> Path:
        return self._records / f"{number:06d}.json"

    def place(self, name: str) -> Path:
        """Return where a file of the output lies by now."""
        unfinished, final = self.files / name, self.out / name
        return final if final.exists() and not unfinished.exists() else unfinished

    def clear(self) -> None:
        """Remove what a merge has left whose plan is not there any more: nobody knows of which inputs it is."""
        with writing(self._plan):
            self._digests.unlink(missing_ok=True)
            self._beside.unlink(missing_ok=True)
            for folder in self._working:
                if folder.exists():
                    shutil.rmtree(folder)

    # The end

    def begin_moving(self, names: Sequence[str]) -> None:
        """Write down what is going to be moved to the output, and remove what an earlier end moved there besides."""
        before = read_json(self._beside)["names"] if self._beside.exists() else []
        with writing(self._beside):
            for name in ({*before} - {*names}) & {*names_in(self.out)}:
                (self.out / name).unlink(missing_ok=True)
            write_whole(self._beside, json.dumps({"names": [*names]}, indent=1), durably=True)

    @property
    def moving(self) -> bool:
        """Whether files of this merge may be in their place."""
        return self._beside.exists()

    @property
    def finished(self) -> bool:
        """Whether all is in place."""
        return self._digests.exists()

    def kept_digests(self) -> dict[str, str]:
        """Return what ``close_work`` has left."""
        return dict(read_json(self._digests))

    def kept_files(self) -> dict[str, Any]:
        """Return what ``close_work`` has left: states of the files with tensors, SHA-256 of the others."""
        return read_json(self._kept) if self._kept.exists() else {}

    def close_work(self, digests: Mapping[str, str], files: Mapping[str, object]) -> None:
        """Say that all is in place, leave plan, digests and files, and remove the rest."""
        with writing(self._digests):
            write_whole(self._kept, json.dumps(files, indent=1), durably=True)
            write_whole(self._digests, json.dumps(digests, indent=1), durably=True)
        for folder in self._working:
            shutil.rmtree(folder, ignore_errors=True)


def share_lock(number: int) -> int:
    """Return the lock of a share of the work."""
    return _SHARES + number


def part_lock(number: int) -> int:
    """Return the lock of a part."""
    return _PARTS + number


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let what the system refuses name the file."""
    try:
        yield
    except OSError as error:
        raise UnreadableError(
            f"cannot write {path}: {_reason(error)}; once that is mended, the same command goes on from here"
        ) from error


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
