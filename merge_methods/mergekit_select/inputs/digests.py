"""What a model's files are: names, sizes and digests, remembered by path, size, times and inode."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from mergekit_select.errors import UnreadableError
from mergekit_select.inputs.files import write_whole

_MOST_GIT = 10 << 20  # a hub keeps larger files by SHA-256 and never as blobs of git
_CHUNK = 1 << 20  # bytes read at once
_RECENT = 2.0  # seconds for which a file's time may not tell one change from the next


@dataclass(frozen=True)
class File:
    """One file of a model.

    Attributes:
        path: Within its folder or repository, with ``/``.
        size: In bytes.
        digest: In hexadecimal, by ``sha256`` or ``gitBlob``; both where it was hashed here.
    """

    path: str
    size: int
    digest: Mapping[str, str]

    def same(self, other: File) -> bool:
        """Whether size and a digest that both have agree."""
        common = self.digest.keys() & other.digest.keys()
        return self.size == other.size and bool(common) and all(self.digest[k] == other.digest[k] for k in common)


class Digests:
    """Digests of files, kept in a file of the user's cache where one is given.

    Args:
        store: That file; None to remember for this object's life only.
        progress: Told the number of bytes after each read.
    """

    def __init__(self, store: Path | None = None, progress: Callable[[int], object] = lambda _: None) -> None:
        self._store = store
        self._progress = progress
        self._known: dict[str, list[object]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or damaged: hash again
            self._known = dict(json.loads(store.read_bytes())) if store is not None else {}

    def of(self, path: Path) -> dict[str, str]:
        """Return a file's digests.

        Raises:
            UnreadableError: It cannot be read.
        """
        try:
            real = path.resolve(strict=True)
            status = real.stat()
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            kept = self._known.get(str(real))
            if isinstance(kept, list) and len(kept) == 2 and kept[0] == state and isinstance(kept[1], dict):
                self._progress(status.st_size)
                return dict(kept[1])
            found = self._hash(real, status.st_size)
        except OSError as error:
            raise UnreadableError(f"cannot read {path}: {error.strerror or error}") from error
        if time.time() - max(status.st_mtime, status.st_ctime) > _RECENT:
            self._known[str(real)] = [state, found]
        return found

    def save(self) -> None:
        """Keep what was learnt; a cache that cannot be written is left as it is."""
        if self._store is None:
            return
        with contextlib.suppress(OSError):
            self._store.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._store, json.dumps(self._known))

    def _hash(self, path: Path, size: int) -> dict[str, str]:
        states = {"sha256": hashlib.sha256()}
        if size <= _MOST_GIT:
            states["gitBlob"] = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                for state in states.values():
                    state.update(chunk)
                self._progress(len(chunk))
        return {name: state.hexdigest() for name, state in states.items()}


def default_store() -> Path:
    """Return the file of the user's cache in which digests are kept."""
    return Path(constants.HF_HOME, "mergekit-select", "digests.json")


def hidden(path: str) -> bool:
    """Whether a file is no part of a model: its name, or a folder that it lies in, begins with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def file_names(folder: Path) -> list[str]:
    """Return the files of a folder and of those in it, sorted; hidden ones are left out."""
    return sorted(
        name
        for place, _, names in os.walk(folder, followlinks=False)
        for name in ((Path(place) / file).relative_to(folder).as_posix() for file in names)
        if not hidden(name)
    )


def folder_files(folder: Path, digests: Digests) -> tuple[File, ...]:
    """Describe the files of a folder.

    Raises:
        UnreadableError: One cannot be read.
    """
    return tuple(File(name, (folder / name).stat().st_size, digests.of(folder / name)) for name in file_names(folder))


def root_digest(files: Mapping[str, str]) -> str:
    """Return one digest for many files: the SHA-256 of their SHA-256, in the order of their paths.

    This is the digest that OpenSSF model-signing gives to a model.

    Args:
        files: SHA-256 in hexadecimal by path.
    """
    return hashlib.sha256(b"".join(bytes.fromhex(files[path]) for path in sorted(files))).hexdigest()


def by_path(file: File) -> str:
    """Sort key of files."""
    return file.path
