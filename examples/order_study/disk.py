"""A full disk, named as what it is, however a library puts it."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from order_study.errors import StudyError

_FULL = ("No space left on device", "os error 28", "code: 28")  # safetensors and others wrap the error
_NEXT_TO_NOTHING = 1 << 24


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what is raised on a full disk into a message that says so.

    Raises:
        StudyError: The disk is full.
    """
    try:
        yield
    except StudyError:
        raise
    except Exception as error:
        free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
        if not _is_full(error, free):
            raise
        raise StudyError(
            f"what is finished is kept, but the disk that holds {folder} is full, with {free / 1e6:.1f} MB left "
            f"({type(error).__name__}: {str(error)[:200]}): make room and run again, which goes on where it stopped"
        ) from error


def _is_full(error: Exception, free: int) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch says no more than that a write failed.
    return any(words in str(error) for words in _FULL) or (isinstance(error, RuntimeError) and free < _NEXT_TO_NOTHING)
