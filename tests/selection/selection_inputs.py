"""Tensors of any bits for the tests of selection, what the reference makes of them, and both kernels."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch

from mergekit_select.bits import integers
from mergekit_select.selection import kernel_c, kernel_torch
from tests import reference

KERNELS = {"c": kernel_c, "torch": kernel_torch}
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return integers(tensor.contiguous())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_bits(
    shape: Sequence[int], dtype: torch.dtype, generator_seed: int, distinct: int | None = None
) -> torch.Tensor:
    """A tensor of any bits at all: NaN payloads, infinities, negative zeros and subnormals among them."""
    generator = torch.Generator().manual_seed(generator_seed)
    if distinct is None:
        flat = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        return flat.view(dtype).view(shape)
    values = random_bits((distinct,), dtype, 99)
    return bits(values)[torch.randint(0, distinct, shape, generator=generator)].view(dtype)


def inputs(
    count: int, shape: Sequence[int], dtype: torch.dtype, distinct: int | None = 3
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sub-models and a base that agree often."""
    tensors = [random_bits(shape, dtype, k + 1, distinct) for k in range(count)]
    return tensors, random_bits(shape, dtype, 0, distinct)


def expected(
    tensors: Sequence[torch.Tensor], base: torch.Tensor | None = None, **options: Any
) -> tuple[list[int], list[int], list[int]]:
    """What the reference says: merged elements, first drawn, and chosen."""
    lists = [bits(tensor).flatten().tolist() for tensor in tensors]
    return reference.merge(lists, None if base is None else bits(base).flatten().tolist(), **options)


def guarded(content: torch.Tensor, at_end: bool) -> torch.Tensor:
    """The tensor in memory of its own, right after a page that must not be touched, or right before one."""
    page = mmap.PAGESIZE
    size = -(-content.nbytes // page) * page
    region = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    for forbidden in (start, start + page + size):
        assert libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    offset = page + (size - content.nbytes if at_end else 0)
    tensor = torch.frombuffer(region, dtype=content.dtype, count=content.numel(), offset=offset)
    tensor.copy_(content.flatten())
    return tensor.view(content.shape)
