"""Memory: for a merged tensor, and for buffers that one tensor's merge leaves to the next."""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache

import torch

# From so many bytes on, a merged tensor is asked for in huge pages. Up to here, glibc's malloc mostly gives memory
# again that was used before, which is faster still.
_HUGE_FROM = 1 << 25


def new_tensor(like: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor of the same shape, dtype and device, of any content.

    New memory comes in pages that the system maps one by one as they are written to, which took a quarter of the time
    of a selection. Linux maps 2 MiB at once instead of 4 KiB where asked to, as numpy asks for its large arrays.
    """
    result = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    size = like.numel() * like.element_size()
    if like.device.type == "cpu" and size >= _HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        start = result.data_ptr()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        # Advice: a kernel without huge pages refuses it, and all is as it was.
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + size - first), mmap.MADV_HUGEPAGE)
    return result


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)  # madvise of the module mmap takes its own mappings only


class Scratch:
    """Hands out buffers, and after ``reset`` the same memory again, in the order in which it was asked for.

    New memory comes in pages that the system maps one by one as they are written to. For the buffers of one chunk that
    takes 1.2 ms, three times as long as merging it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._blocks: list[torch.Tensor] = []
        self._given = 0

    def reset(self) -> None:
        """Take back all buffers; whoever still has one must not use it."""
        self._given = 0

    def bytes(self) -> int:
        """Return how much memory there is."""
        return sum(map(len, self._blocks))

    def empty(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a buffer of that many elements, of any content."""
        size = length * dtype.itemsize
        if self._given == len(self._blocks):
            self._blocks.append(self._new(size))
        elif len(self._blocks[self._given]) < size:
            self._blocks[self._given] = self._new(size)
        self._given += 1
        return self._blocks[self._given - 1][:size].view(dtype)

    def _new(self, size: int) -> torch.Tensor:
        # A tensor made in inference mode could never be written to outside it.
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device=self._device)
