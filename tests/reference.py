"""The draws and both methods, slow and obvious, from docs/draws.md and docs/methods.md, in Python integers.

Shares no code with the package; what it takes and returns are lists of the integers that the elements' bits are.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

MASK = 2**64 - 1


def splitmix64(key: int, n: int) -> int:
    """Output n (from 0) of SplitMix64 seeded with key."""
    z = (key + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def stream_key(seed: int, name: str, draw_round: int) -> int:
    message = b"mergekit-select/draws/1\x00" + seed.to_bytes(8, "little") + draw_round.to_bytes(4, "little")
    digest = hashlib.sha256(message + name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def draw(seed: int, name: str, draw_round: int, element: int) -> int:
    word = splitmix64(stream_key(seed, name, draw_round), element // 4)
    return ((word >> 16 * (element % 4)) & 0xFFFF) ^ 0x8000


def slots(weights: list[float]) -> list[int]:
    """Weights as whole numbers of slots, at most 65535 in all."""
    exact = [Fraction(w) for w in weights]
    scale = math.lcm(*(w.denominator for w in exact))
    whole = [int(w * scale) for w in exact]
    divisor = math.gcd(*whole)
    whole = [w // divisor for w in whole]
    if sum(whole) <= 65535:
        return whole
    result = [0] * len(whole)
    left, sharing = 65535, {k for k, w in enumerate(whole) if w}
    while tiny := {k for k in sharing if Fraction(whole[k] * left, sum(whole[j] for j in sharing)) < 1}:
        for k in tiny:
            result[k] = 1
        left -= len(tiny)
        sharing -= tiny
    quotas = {k: Fraction(whole[k] * left, sum(whole[j] for j in sharing)) for k in sharing}
    for k, quota in quotas.items():
        result[k] = math.floor(quota)
    for k in sorted(sharing, key=lambda k: (math.floor(quotas[k]) - quotas[k], k))[: 65535 - sum(result)]:
        result[k] += 1
    return result


def choose(u: int, counts: list[int], among: set[int]) -> int:
    """The first sub-model among those given at which the sum of slots exceeds u * S / 2^16 rounded down."""
    target = u * sum(counts[k] for k in among) // 65536
    reached = 0
    for k in sorted(among):
        reached += counts[k]
        if reached > target:
            return k
    raise AssertionError("unreachable")


def merge(
    models: list[list[int]],
    base: list[int] | None = None,
    *,
    weights: list[float] | None = None,
    rounds: int | None = None,
    seed: int = 0,
    name: str = "",
    start: int = 0,
) -> tuple[list[int], list[int], list[int]]:
    """Merged elements, the sub-model drawn first for each, and the one chosen in the end (-1: left at the base).

    The first of these elements has number ``start`` in its tensor.
    """
    counts = slots(weights or [1.0] * len(models))
    everyone = {k for k, count in enumerate(counts) if count}
    merged, firsts, chosen = [], [], []
    for d in range(len(models[0])):
        first = choose(draw(seed, name, 0, start + d), counts, everyone)
        k = first
        if base is not None and (rounds is None or rounds >= len(everyone) - 1):
            differing = {j for j in everyone if models[j][d] != base[d]}
            k = choose(draw(seed, name, 0, start + d), counts, differing) if differing else -1
        elif base is not None:
            assert rounds is not None
            left, draw_round = everyone - {k}, 1
            while models[k][d] == base[d] and draw_round <= rounds:
                k = choose(draw(seed, name, draw_round, start + d), counts, left)
                left, draw_round = left - {k}, draw_round + 1
            if models[k][d] == base[d]:
                k = -1
        merged.append(base[d] if base is not None and k == -1 else models[k][d])
        firsts.append(first)
        chosen.append(k)
    return merged, firsts, chosen
