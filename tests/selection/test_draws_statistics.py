"""Draws of one tensor, and of neighbouring seeds, layers and rounds, are spread as independent uniform numbers are.

Each test computes the probability of a result at least as far out and fails below one in a million, on either side. All
is a function of fixed keys, so what passes once passes always. docs/draws.md has the long runs of other batteries.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.raw_draws import KEYS, chunk
from mergekit_select.selection.draws import _GAMMA, BITS, stream_key

ALPHA = 1e-6
COUNT = 1 << 20  # draws a test looks at
STREAMS = 64

Keys = list[int]
ALL = {"one tensor": [stream_key(0, "x")]} | {name: [key(i) for i in range(STREAMS)] for name, key in KEYS.items()}
every_stream = pytest.mark.parametrize("keys", ALL.values(), ids=ALL)


def draws(keys: Keys) -> torch.Tensor:
    """Return draws as they are written for other batteries: the first ones of all streams, then the second ones."""
    written = np.frombuffer(chunk(keys, 0, COUNT // len(keys)), np.uint16)
    return torch.from_numpy(written.astype(np.int64))


def of_chi_square(observed: torch.Tensor) -> float:
    """Return the probability of this chi-square or more, each cell being as likely as any other."""
    expected = float(observed.sum()) / observed.numel()
    statistic = ((observed.double() - expected) ** 2).sum() / expected
    return float(torch.special.gammaincc(torch.tensor((observed.numel() - 1) / 2.0).double(), statistic / 2))


def of_poisson(events: int, mean: float) -> tuple[float, float]:
    """Return the probabilities of at most so many events, and of at least so many."""
    most = torch.special.gammaincc(torch.tensor(events + 1.0).double(), torch.tensor(mean).double())
    least = torch.special.gammainc(torch.tensor(float(max(events, 1))).double(), torch.tensor(mean).double())
    return float(most), float(least) if events else 1.0


def serial(values: torch.Tensor, lag: int) -> float:
    """Return the probability of the counts of pairs that lie so far apart, by their upper and by their lower bytes."""
    whole = values[: len(values) // (2 * lag) * 2 * lag]
    first, second = whole.view(-1, 2, lag).unbind(1)  # pairs that have no draw in common
    worst = 1.0
    for shift in (8, 0):
        pairs = ((first >> shift & 255) << 8 | second >> shift & 255).flatten()
        p = of_chi_square(torch.bincount(pairs, minlength=1 << 16))
        worst = min(worst, p, 1 - p)
    return worst


@every_stream
def test_single_draws_are_equally_likely(keys: Keys) -> None:
    p = of_chi_square(torch.bincount(draws(keys), minlength=1 << BITS))
    assert ALPHA < p < 1 - ALPHA


@every_stream
@pytest.mark.parametrize("lag", [1, 4, STREAMS])
def test_serial_pairs_are_equally_likely(keys: Keys, lag: int) -> None:
    assert serial(draws(keys), lag) > ALPHA


@every_stream
@pytest.mark.parametrize("lag", [1, 3, STREAMS])
def test_equal_neighbours_are_as_many_as_poisson_says(keys: Keys, lag: int) -> None:
    values = draws(keys)
    equal = int((values[lag:] == values[:-lag]).sum())
    assert min(of_poisson(equal, (len(values) - lag) / 2**BITS)) > ALPHA


@every_stream
def test_birthday_spacings_are_as_many_as_poisson_says(keys: Keys) -> None:
    """G. Marsaglia's test, within the bounds of P. L'Ecuyer and R. Simard ("On the performance of birthday spacings
    tests with certain families of random number generators", 2001): m birthdays in n days have Poisson's number of
    equal spacings, of mean m^3 / 4n, as long as m is at most n^(5/12) / 2^(7/3).
    """
    m, n = 1 << 11, 1 << 32
    days = draws(keys).view(-1, m, 2) @ torch.tensor([1 << BITS, 1])
    spacings = days.sort(dim=1).values.diff(dim=1).sort(dim=1).values
    equal = int((spacings.diff(dim=1) == 0).sum())
    assert min(of_poisson(equal, len(days) * m**3 / (4 * n))) > ALPHA


def test_streams_that_overlap_would_be_found() -> None:
    """Or the tests above could not fail. Here each stream is the one before it, from its fifth draw on."""
    overlapping = draws([stream_key(0, "x") + i * _GAMMA for i in range(STREAMS)])
    assert serial(overlapping, lag=1) < ALPHA
    equal = int((overlapping[4 * STREAMS - 1 :] == overlapping[: 1 - 4 * STREAMS]).sum())
    assert min(of_poisson(equal, len(overlapping) / 2**BITS)) < ALPHA
