"""How a merge uses the machine: limits on which no bit depends, and memory for its result."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Limits:
    """From which sizes on, and in parts of which size. The figures behind them are in docs/performance.md.

    Attributes:
        shared_bytes: Results of this size and above are shared among threads; smaller ones are done before another
            thread has woken up.
        part_bytes: Of the result, merged by a thread before it takes the next part.
        huge_pages_bytes: Results of this size and above ask for huge pages; smaller ones may hold none.
        chunk: The most elements that torch's operations handle at once on a processor: so few that torch does not share
            an operation among its threads, which takes many times as long where another process is busy.
        accelerator_chunk: The same on an accelerator, which has kernel launches to make up for.
        masks: The most elements of a chunk's masks and positions, of all sub-models together.
    """

    shared_bytes: int = 1 << 22
    part_bytes: int = 1 << 19
    huge_pages_bytes: int = 1 << 25
    chunk: int = 1 << 14
    accelerator_chunk: int = 1 << 20
    masks: int = 1 << 24

    def chunk_of(self, device: torch.device, sub_models: int) -> int:
        """Return how many elements torch's operations handle at once."""
        most = self.chunk if device.type == "cpu" else self.accelerator_chunk
        return max(1, min(most, self.masks // sub_models))


LIMITS = Limits()
_libc = partial(ctypes.CDLL, None)  # madvise of the module mmap takes its own mappings only


def new_tensor(like: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Return a contiguous tensor of the same shape, dtype and device, of any content.

    New memory comes in pages that the system maps one by one as they are written to, which can take longer than to
    merge what they hold. Linux maps 2 MiB at once instead of 4 KiB where asked to, as numpy asks for its large arrays.
    """
    result = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if like.device.type == "cpu" and result.nbytes >= limits.huge_pages_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
        start = result.data_ptr()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        # Advice: a system without huge pages refuses it, and all is as it was.
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + result.nbytes - first), mmap.MADV_HUGEPAGE)
    return result
