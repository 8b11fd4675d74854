"""Map each tensor from its file for as long as it is used, where mergekit maps whole files until the merge ends.

What is mapped is filled at once: a file that was cut off, or a disk that fails, is then an error instead of a signal
that ends the process. Memory holds the inputs of one tensor, not all files.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader

from mergekit_select.errors import UnreadableError
from mergekit_select.inputs.checkpoint import StoredTensor, read_header, read_shard

_OPEN = 2  # files of a model that are kept open: the one being read, and the one being read ahead
_MADV_POPULATE_READ = 22  # of Linux 5.14 and newer; Python's mmap does not name it
_ALIGNED = 8  # bytes: no dtype needs more


class Loader(LazyTensorLoader):
    """mergekit's loader of one model, which keeps descriptions of all tensors and maps them one by one.

    Args:
        name: The model, for messages.
        loader: mergekit's own, which is left to read pickles.

    Attributes:
        files: The weight files.

    Raises:
        UnreadableError: A file is missing or damaged, or the index disagrees with one.
    """

    def __init__(self, name: str, loader: LazyTensorLoader) -> None:
        super().__init__(loader.index, loader.lazy_unpickle)
        self.files = [Path(self.index.base_path, shard.filename) for shard in self.index.shards]
        self._open: dict[str, FileIO] = {}
        self._starts: dict[str, dict[str, int]] = {}
        self._stored: dict[str, StoredTensor] = {}
        # Every header is read at once: what is missing or cut off is better said now than in the middle.
        for file, shard in zip(self.files, self.index.shards, strict=True):
            if not file.is_file():
                raise UnreadableError(f"model {name}: the index names the shard {file.name}, which is not there")
            if self.index.is_safetensors:
                held = read_header(file)[0]
                absent = sorted(set(shard.contained_keys) - held.keys())
                if absent:
                    raise UnreadableError(
                        f"model {name}: the index says that {file.name} holds {absent[0]!r}, which it does not"
                    )
                self._stored.update((key, held[key]) for key in shard.contained_keys)

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """All tensors' descriptions by name; those of pickles are read when first asked for."""
        if not self.index.is_safetensors and not self._stored:
            for file in self.files:
                self._stored.update(read_shard(file))
        return self._stored

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> torch.Tensor | None:
        """Read one tensor, as mergekit's own loader does."""
        key = next((name for name in (key, *(aliases or ())) if name in self.index.tensor_paths), key)
        if not self.index.is_safetensors or key not in self.index.tensor_paths:
            return super().get_tensor(key, device, aliases, raise_on_missing)
        stored = self._stored[key]
        dtype = getattr(torch, stored.dtype)
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=dtype, device=device)
        array = _mapped(*self._place(key), stored.nbytes)
        return torch.from_numpy(array).view(dtype).reshape(stored.shape).to(device)

    def expect(self, key: str) -> None:
        """Have the system read a tensor ahead, where it can."""
        if self.index.is_safetensors and hasattr(os, "posix_fadvise"):
            file, start = self._place(key)
            os.posix_fadvise(file.fileno(), start, self._stored[key].nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files."""
        while self._open:
            self._open.popitem()[1].close()

    def _place(self, key: str) -> tuple[FileIO, int]:
        """Return the open file of a tensor, and where its data begins there."""
        name = self.index.tensor_paths[key]
        if name not in self._open:
            while len(self._open) >= _OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[name] = FileIO(str(Path(self.index.base_path, name)))
        file = self._open[name]
        if name not in self._starts:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._starts[name] = {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}
        return file, self._starts[name][key]


def _mapped(file: FileIO, start: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return bytes of a file, mapped until nothing refers to the array or a tensor on it; writing changes no file."""
    lead = start % mmap.ALLOCATIONGRANULARITY
    try:
        memory = mmap.mmap(file.fileno(), lead + size, access=mmap.ACCESS_COPY, offset=start - lead)
    except ValueError as error:
        raise UnreadableError(f"{file.name} ended while it was read; was it replaced during the merge?") from error
    if sys.platform == "linux":
        try:
            memory.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # an older Linux
                raise UnreadableError(f"cannot read {file.name}: {error.strerror}") from error
    array = np.frombuffer(memory, np.uint8, size, lead)
    return array if start % _ALIGNED == 0 else array.copy()
