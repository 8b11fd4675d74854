"""A tensor's bits as integers: views of them, equality, digests. Two values are equal when their bits are."""

from __future__ import annotations

import hashlib

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements hashed or compared at once, so that a mask stays below a megabyte


def integer_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the integer dtype as wide as an element; uint8 for elements of more than 64 bits."""
    return _INTEGERS.get(dtype.itemsize, torch.uint8)


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """View the elements as the integers that their bits are.

    Returns:
        A view of the same shape (for elements of more than 64 bits, with a longer last axis) and device, without
        autograd history.
    """
    return tensor.detach().view(integer_dtype(tensor.dtype))


def flat_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same in row-major order, shape (n,), on the processor; copied only where it must be."""
    return integers(tensor.to("cpu").contiguous().reshape(-1))


def describe(tensor: torch.Tensor) -> str:
    """Return dtype and shape as text, such as ``bfloat16 [3, 4]``."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of ``describe``'s text, a newline, and the elements' bytes in row-major order, in hexadecimal.

    It depends neither on the file a tensor lies in nor on its place there. Bytes are little-endian.
    """
    state = hashlib.sha256(f"{describe(tensor)}\n".encode())
    content = flat_integers(tensor).view(torch.uint8)
    for start in range(0, len(content), _CHUNK):
        state.update(content[start : start + _CHUNK].numpy().data)
    return state.hexdigest()


def count_differing(left: torch.Tensor, right: torch.Tensor) -> tuple[int, int]:
    """Compare two tensors of one dtype and shape, bit by bit.

    Returns:
        How many elements differ, and the row-major index of the first; 0 and -1 where none does.
    """
    a, b = flat_integers(left), flat_integers(right)
    count, first = 0, -1
    for start in range(0, len(a), _CHUNK):
        part, other = a[start : start + _CHUNK], b[start : start + _CHUNK]
        if torch.equal(part, other):
            continue
        differing = torch.ne(part, other)
        if first < 0:
            first = start + int(differing.to(torch.uint8).argmax())
        count += int(torch.count_nonzero(differing))
    return count, first
