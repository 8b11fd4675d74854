"""Draws, version 1: (seed, tensor name, round, element) -> 16 random bits, the same on every device.

``docs/draws.md`` specifies them byte by byte. The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014, doi:10.1145/2660193.2660195), whose n-th output is a pure function of
its seed and n. The seed, here called key, is a hash of seed, tensor name and round. One output of 64 bits serves four
neighbouring elements.

This file is frozen: recipes on model hubs depend on its bits. Other draws would be a version 2 beside it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from mergekit_select.errors import MergekitSelectError, ParameterError

VERSION = 1
BITS = 16  # of a draw
LANES = 64 // BITS  # draws in one word of the generator
SEED_LIMIT = 1 << 63

_DOMAIN = b"mergekit-select/draws/1\0"
_GAMMA = 0x9E3779B97F4A7C15


_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))  # shift, factor

if sys.byteorder != "little":
    raise MergekitSelectError(
        f"draws version {VERSION} read 64-bit words as four 16-bit lanes in little-endian order, and this machine is "
        f"{sys.byteorder}-endian: its merges would have other bits; run the merge on a little-endian machine"
    )


def stream_key(seed: int, name: str, draw_round: int = 0) -> int:
    """Return the 64-bit key of one tensor's draws in one round.

    Args:
        seed: The recipe's seed, in [0, 2^63).
        name: The output tensor's name; empty when it has none.
        draw_round: 0 for the first draw, r for the r-th redraw; in [0, 2^32).

    Raises:
        ParameterError: The seed is out of range.
    """
    if not 0 <= seed < SEED_LIMIT:
        raise ParameterError(f"seed must be an integer in [0, 2^63), got {seed}")
    message = (
        _DOMAIN + seed.to_bytes(8, "little") + draw_round.to_bytes(4, "little") + name.encode("utf-8", "surrogatepass")
    )
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little")


def _generate(
    state: int, multiples: npt.NDArray[np.uint64], words: npt.NDArray[np.uint64], shifted: npt.NDArray[np.uint64]
) -> None:
    """Write the generator's outputs for the states ``state + multiples`` to ``words``, on a processor.

    With numpy, which shifts in zeros and multiplies three times as fast, this takes 60 % of what it takes with torch.

    Args:
        state: Any integer; taken modulo 2^64.
        multiples: Shape (n,), of the generator's increment.
        words: Shape (n,).
        shifted: Shape (n,), of any content.
    """
    np.add(multiples, np.uint64(state % (1 << 64)), out=words)
    for shift, factor in _MIX:
        np.right_shift(words, np.uint64(shift), out=shifted)
        np.bitwise_xor(words, shifted, out=words)
        if factor is not None:
            np.multiply(words, np.uint64(factor), out=words)


def _generate_on_accelerator(state: int, multiples: torch.Tensor, words: torch.Tensor, shifted: torch.Tensor) -> None:
    """Do what ``_generate`` does, in torch's operations and int64, on any device."""
    torch.add(multiples, _as_int64(state), out=words)
    for shift, factor in _MIX:
        # torch shifts int64 arithmetically; the mask makes it the logical shift that the generator asks for.
        torch.bitwise_right_shift(words, shift, out=shifted)
        words.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            words.mul_(_as_int64(factor))


def _as_int64(value: int) -> int:
    """Return the signed 64-bit integer congruent to value modulo 2^64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _empty(length: int, dtype: torch.dtype, device: torch.device | str | None = None) -> torch.Tensor:
    return torch.empty(length, dtype=dtype, device=device)


class DrawStream:
    """Writes a tensor's draws, one run of elements at a time, into buffers.

    Args:
        length: The most draws that one call of ``read`` is asked for.
        empty: Makes a buffer of so many elements of a dtype; the draws are computed on its device, on which no bit
            depends. Buffers of its own on the default device when left out.
    """

    BYTES = 6  # of buffers, for each draw of ``length``

    def __init__(self, length: int, empty: Callable[[int, torch.dtype], torch.Tensor] = _empty):
        words = -(-length // LANES) + 1  # a run that starts inside a word ends inside another
        self._multiples, self._words, self._shifted = (empty(words, torch.int64) for _ in range(3))
        torch.arange(words, out=self._multiples).mul_(_as_int64(_GAMMA))
        self._fit(words)

    def _fit(self, count: int) -> None:
        # Runs mostly have one length: slicing the buffers only when it changes saves a tenth of the time.
        self._count = count
        self._views = (self._multiples[:count], self._words[:count], self._shifted[:count])
        self._arrays = None
        if self._words.device.type == "cpu":
            multiples, words, shifted = (view.numpy().view(np.uint64) for view in self._views)
            self._arrays = (multiples, words, shifted)
        self._lanes = self._words[:count].view(torch.int16)

    def read(self, key: int, start: int, stop: int) -> torch.Tensor:
        """Return the draws of elements ``start`` to ``stop`` in the stream of this key.

        Returns:
            int16, shape (stop - start,): each draw minus 2^15, so that signed comparison orders draws. A view of this
            object's buffer, valid until the next call.
        """
        first = start // LANES
        count = -(-stop // LANES) - first
        if count != self._count:
            self._fit(count)
        # Before output n of SplitMix64, its state is key + (n + 1) * gamma, modulo 2^64.
        state = key + (first + 1) * _GAMMA
        if self._arrays is not None:
            _generate(state, *self._arrays)
        else:
            _generate_on_accelerator(state, *self._views)
        skip = start - first * LANES
        aligned = skip == 0 and stop - start == count * LANES
        return self._lanes if aligned else self._lanes[skip : skip + stop - start]


def draw(
    start: int,
    stop: int,
    *,
    seed: int = 0,
    name: str = "",
    draw_round: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return the draws of elements ``start`` to ``stop`` (row-major) of the tensor with this name.

    Args:
        start: First element, at least 0.
        stop: One past the last element.
        seed: The recipe's seed, in [0, 2^63).
        name: The output tensor's name.
        draw_round: 0 for the first draw, r for the r-th redraw.
        device: Where to compute; the result does not depend on it.

    Returns:
        int32, shape (stop - start,), values in [0, 2^16).
    """
    stream = DrawStream(stop - start, partial(_empty, device=device))
    return stream.read(stream_key(seed, name, draw_round), start, stop).to(torch.int32) + (1 << (BITS - 1))
