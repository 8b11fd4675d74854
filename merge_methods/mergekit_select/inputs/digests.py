"""What a model's files are: names, sizes and digests, remembered by path, size, times and inode.

Files are hashed side by side, since SHA-256 takes longer than reading.
"""

from __future__ import annotations

import _thread
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from mergekit_select.errors import UnreadableError
from mergekit_select.inputs.bounds import require_regular
from mergekit_select.inputs.files import forget, input_names, write_whole
from mergekit_select.inputs.processors import cores

_MOST_GIT = 10 << 20  # a hub keeps larger files by SHA-256 and never as blobs of git
_CHUNK = 16 << 20  # bytes read and hashed at once: so many that a thread rarely waits for the interpreter
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
        progress: Told the number of bytes after each read, by one thread at a time.
    """

    def __init__(self, store: Path | None = None, progress: Callable[[int], object] = lambda _: None) -> None:
        self._store = store
        self._progress = progress
        self._counting, self._stopped = threading.Lock(), threading.Event()
        self._hashing: dict[str, threading.Lock] = {}
        self._known: dict[str, list[object]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or damaged: hash again
            self._known = dict(json.loads(store.read_bytes())) if store is not None else {}

    def of(self, path: Path, *, keep: bool = True) -> dict[str, str]:
        """Return a file's digests; another thread that wants them meanwhile waits for this one.

        Args:
            path: The file.
            keep: Whether the system is to keep it in memory.

        Raises:
            UnreadableError: It cannot be read, or is no regular file.
        """
        try:
            real = path.resolve(strict=True)
            with self._hashing.setdefault(str(real), threading.Lock()):
                return self._of(real, keep)
        except OSError as error:
            raise UnreadableError(f"cannot read {path}: {error.strerror or error}") from error
        except RuntimeError as error:  # before Python 3.13, instead of an OSError
            raise UnreadableError(f"cannot read {path}: its links lead in a circle") from error
        except MemoryError as error:
            raise UnreadableError(f"cannot read {path}: there is not enough memory") from error

    def of_all(self, paths: Iterable[Path], *, keep: bool = True) -> list[dict[str, str]]:
        """Return several files' digests.

        Args:
            paths: The files.
            keep: Whether the system is to keep them in memory.

        Raises:
            UnreadableError: One cannot be read.
        """
        threads, files = ThreadPoolExecutor(cores()), [*paths]
        try:
            return list(threads.map(partial(self.of, keep=keep), files))
        except RuntimeError:  # the system gives no thread
            return [self.of(path, keep=keep) for path in files]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def ahead(self, folders: Iterable[Path]) -> None:
        """Begin to hash what will be asked for; what cannot be read, the one who asks will hear of."""

        def hash_each() -> None:
            with contextlib.suppress(Exception):
                for folder in folders:
                    with contextlib.suppress(Exception):
                        folder_files(folder, self)

        with contextlib.suppress(RuntimeError):  # the system gives no thread
            # threading's start would wait for ever for a thread that has no memory to begin.
            _thread.start_new_thread(hash_each, ())

    def close(self) -> None:
        """Stop what was begun, and save what was learnt."""
        self._stopped.set()
        self.save()

    def save(self) -> None:
        """Keep what was learnt; a cache that cannot be written is left as it is."""
        if self._store is None:
            return
        with contextlib.suppress(OSError):
            self._store.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._store, json.dumps(dict(self._known)))

    def _of(self, real: Path, keep: bool) -> dict[str, str]:
        status = real.stat()
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        kept = self._known.get(str(real))
        if isinstance(kept, list) and len(kept) == 2 and kept[0] == state and isinstance(kept[1], dict):
            self._count(status.st_size)
            return dict(kept[1])
        require_regular(real)
        found = self._hash(real, status.st_size, keep)
        if time.time() - max(status.st_mtime, status.st_ctime) > _RECENT:
            self._known[str(real)] = [state, found]
        return found

    def _count(self, size: int) -> None:
        with self._counting:
            self._progress(size)

    def _hash(self, path: Path, size: int, keep: bool) -> dict[str, str]:
        states = {"sha256": hashlib.sha256()}
        if size <= _MOST_GIT:
            states["gitBlob"] = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        chunk = memoryview(bytearray(min(size, _CHUNK) or 1))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(chunk):
                if self._stopped.is_set():
                    raise UnreadableError(f"stopped while hashing {path}")
                for state in states.values():
                    state.update(chunk[:count])
                self._count(count)
                if not keep:
                    forget(file.fileno(), file.tell() - count, count)
        return {name: state.hexdigest() for name, state in states.items()}


def default_store() -> Path:
    """Return the file of the user's cache in which digests are kept."""
    return Path(constants.HF_HOME, "mergekit-select", "digests.json")


def folder_files(folder: Path, digests: Digests, names: Sequence[str] | None = None) -> tuple[File, ...]:
    """Describe files of a folder.

    Args:
        folder: The folder.
        digests: Remembers what was hashed.
        names: Which of its files; None for those that a merge may read, the folder being a model's.

    Raises:
        UnreadableError: One cannot be read.
    """
    names = input_names(folder) if names is None else names
    found = digests.of_all(folder / name for name in names)
    return tuple(File(name, (folder / name).stat().st_size, digest) for name, digest in zip(names, found, strict=True))


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
