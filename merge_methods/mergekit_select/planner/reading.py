"""Read tensors into buffers that are used again, in place of mergekit's mapped files.

mergekit maps safetensors files, and every page that is touched for the first time costs a fault: for models in the page
cache that is half of a merge's time. Copying them into memory that has been touched before costs a
quarter of that.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import weakref
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader

from mergekit_select.errors import UnreadableError
from mergekit_select.inputs.checkpoint import StoredTensor, read_header, read_shard

_OPEN = 2  # files of a model that are kept open: the one being read, and the one being read ahead
_HUGE_PAGE = 2 << 20


class Buffers:
    """Anonymous memory for tensors; what no tensor lies in any more is used again."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def take(self, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Return ``size`` bytes, whose memory comes back here once nothing refers to the array or a tensor on it."""
        fitting = [memory for memory in self._free if len(memory) >= size]
        if fitting:
            memory = min(fitting, key=len)
            self._free.remove(memory)
        else:
            if self._free:  # one too small gives way, so that there are never more than were in use at once
                self._free.remove(min(self._free, key=len))
            memory = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(memory, np.uint8, size)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array


class Loader(LazyTensorLoader):
    """mergekit's loader of one model, which keeps descriptions of all tensors and reads into buffers.

    Args:
        name: The model, for messages.
        loader: mergekit's own, which is left to read pickles.
        buffers: Where tensors are read to.

    Attributes:
        files: The weight files.

    Raises:
        UnreadableError: A file is missing or damaged, or the index disagrees with one.
    """

    def __init__(self, name: str, loader: LazyTensorLoader, buffers: Buffers) -> None:
        super().__init__(loader.index, loader.lazy_unpickle)
        self.files = [Path(self.index.base_path, shard.filename) for shard in self.index.shards]
        self._buffers = buffers
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
        array = self._buffers.take(stored.nbytes)
        file, start = self._place(key)
        file.seek(start)
        left = array.data
        while left:
            count = file.readinto(left)
            if not count:
                raise UnreadableError(f"{file.name} ended while it was read; was it replaced during the merge?")
            left = left[count:]
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
