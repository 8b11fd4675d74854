"""The kernels against each other and, in places, against the reference, on thousands of random configurations.

By hand: ``PYTHONPATH=tests python tests/selection/random_configurations.py 0 20000``, in minutes. The first
hundred are a test.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from typing import Any

import torch

from mergekit_select.selection import kernel_c
from mergekit_select.selection.limits import Limits
from mergekit_select.selection.merge import merge, trace
from mergekit_select.selection.plan import make_selection
from tests.selection.selection_inputs import DTYPES, KERNELS, bits, expected, random_bits, same

EDGES = (0, 1, 3, 4, 5, 252, 255, 256, 257, 260, 511, 512, 513, 767, 768, 769)  # of lanes and blocks
WEIGHTS = (
    lambda r: 1,
    lambda r: r.choice([0, 1, 1, 2]),
    lambda r: r.random(),
    lambda r: r.choice([1e-9, 1, 1e9]),
    lambda r: r.choice([1, 32767]),
    lambda r: 1 + r.choice([0, 2**-45]),
)


def sub_models(r: random.Random) -> int:
    return r.choices([r.randint(1, 6), r.randint(7, 40), r.randint(41, 1024)], [80, 18, 2])[0]


def tensor(r: random.Random, length: int, dtype: torch.dtype, distinct: int | None, strided: bool) -> torch.Tensor:
    if not strided:
        return random_bits((length,), dtype, r.randrange(1 << 30), distinct)
    return random_bits((length, r.choice([1, 2, 3])), dtype, r.randrange(1 << 30), distinct)[:, 0]


def check(case: int) -> None:
    r = random.Random(case)
    count, length, dtype = sub_models(r), r.choice(EDGES) if r.random() < 0.7 else r.randint(0, 1500), r.choice(DTYPES)
    distinct = r.choice([1, 2, 2, 3, None])
    tensors = [tensor(r, length, dtype, distinct, r.random() < 0.1) for _ in range(count)]
    base = r.choice([None, tensor(r, length, dtype, distinct, r.random() < 0.1)])
    for k in range(count if base is not None else 0):
        if r.random() < 0.2 and base is not None:
            tensors[k] = base
    kind = r.choice(WEIGHTS)
    weights = [kind(r) for _ in tensors]
    weights = weights if any(weights) else [1] * count
    rounds = None if base is None else r.choice([None, 1, 2, r.randint(1, min(count + 1, 9))])
    options: dict[str, Any] = dict(
        weights=weights, rounds=rounds, seed=r.randrange(2**63), name=r.choice(["", "a", "größe", "w" * 300])
    )
    start = r.choice([0, 0, r.randrange(9), 2**32 - r.randrange(600), r.randrange(2**45)])
    selection = replace(make_selection(tensors, base, **options), origin=start)

    merged = merge(
        selection, Limits(shared_bytes=r.choice([1, 1 << 30]), part_bytes=r.choice([8, 1000, 1 << 20])), kernel_c
    )
    assert same(
        merged, merge(selection, Limits(chunk=r.choice([7 if length < 100 else 250, 256, 1 << 16])), KERNELS["torch"])
    )
    assert merged.shape == (length,)
    if base is None:
        del options["rounds"]
    for place in {0, max(0, 254 % (length + 1)), max(0, length - 3)}:
        here = slice(place, place + 3)
        found = expected(
            [t[here] for t in tensors], None if base is None else base[here], **options, start=start + place
        )
        assert bits(merged)[here].tolist() == found[0]
    if case % 10 == 0:
        for one, other in zip(
            trace(selection, kernel=kernel_c), trace(selection, kernel=KERNELS["torch"]), strict=True
        ):
            assert torch.equal(one.first, other.first)
            assert torch.equal(one.chosen, other.chosen)


def main() -> None:
    """Check the configurations numbered from the first argument to the second."""
    first, last = map(int, sys.argv[1:])
    for case in range(first, last):
        try:
            check(case)
        except Exception as error:
            raise SystemExit(f"configuration {case}: {error!r}") from error
    print(f"configurations {first} to {last - 1}: the kernels and the reference agree")


if __name__ == "__main__":
    main()
