"""Temporary files that a killed merge leaves in its folder, and that are provably a merge's."""

from __future__ import annotations

import re
import time
from pathlib import Path

from mergekit_select.errors import UnreadableError
from mergekit_select.inputs.bounds import read_start

# safetensors writes to .tmpXXXXXX and renames. mergekit's shards have no -of-N until their number is known, but so have
# those of other people's models.
_NAMES = re.compile(r"\.tmp[A-Za-z0-9]{6}")
_HEADER = re.compile(
    rb'.{8}\{"__metadata__":\{"format":"pt"\}', re.DOTALL
)  # as mergekit has safetensors begin each file
_STILL = 600  # seconds without a change after which no merge is writing a file any more


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files in a folder that begin as a merge's tensors do, and that nobody writes any more."""
    now = time.time()
    found = sorted(path for path in folder.iterdir() if _NAMES.fullmatch(path.name))
    return [path for path in found if _is_ours(path) and now - path.stat().st_mtime > _STILL]


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove these files; return them.

    Raises:
        UnreadableError: There is no such folder, or a file cannot be removed.
    """
    try:
        found = leftovers(folder)
        for path in found:
            path.unlink()
    except OSError as error:
        raise UnreadableError(f"cannot clean {folder}: {error.strerror}: {error.filename}") from error
    return found


def _is_ours(path: Path) -> bool:
    try:
        return not path.is_symlink() and bool(_HEADER.match(read_start(path, 64)))
    except UnreadableError:
        return False
