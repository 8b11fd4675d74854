"""Draws, version 1: (seed, tensor name, round, element) -> 16 random bits, the same on every device.

``docs/draws.md`` specifies them byte by byte. The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014, doi:10.1145/2660193.2660195), whose n-th output is a pure function of
its seed and n. The seed, here called key, is a hash of seed, tensor name and round. One output of 64 bits serves four
neighbouring elements.

The bits are frozen: recipes on model hubs depend on them. Other draws would be a version 2 beside this file, and
beside the same generator in ``kernel.c``.
"""

from __future__ import annotations

import hashlib
import sys

import torch

from mergekit_select.errors import MergekitSelectError, ParameterError

VERSION = 1
BITS = 16  # of a draw
HALF = 1 << (BITS - 1)
LANES = 64 // BITS  # draws in one word of the generator
SEED_LIMIT = 1 << 63

_DOMAIN = b"mergekit-select/draws/1\0"
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # shift, factor

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
    if not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise ParameterError(f"seed must be an integer in [0, 2^63), got {seed!r}")
    message = (
        _DOMAIN + seed.to_bytes(8, "little") + draw_round.to_bytes(4, "little") + name.encode("utf-8", "surrogatepass")
    )
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little")


def lowered_draws(key: int, start: int, stop: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return the draws of elements ``start`` to ``stop`` in the stream of this key.

    Returns:
        int16, shape (stop - start,): each draw minus 2^15, so that signed comparison orders draws.
    """
    first = start // LANES
    count = -(-stop // LANES) - first
    # Before output n of SplitMix64, its state is key + (n + 1) * gamma, modulo 2^64.
    words = torch.arange(count, device=device, dtype=torch.int64)
    words.mul_(_as_int64(_GAMMA)).add_(_as_int64(key + (first + 1) * _GAMMA))
    for shift, factor in _MIX:
        # torch shifts int64 arithmetically; the mask makes it the logical shift that the generator asks for.
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_as_int64(factor))
    return words.view(torch.int16)[start - first * LANES :][: stop - start]


def _as_int64(value: int) -> int:
    """Return the signed 64-bit integer congruent to value modulo 2^64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


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
    return lowered_draws(stream_key(seed, name, draw_round), start, stop, device).to(torch.int32) + HALF
