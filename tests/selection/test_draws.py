"""Draws: known answers, the reference, independence of how a tensor is cut, and statistics."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_select import draw
from mergekit_select.errors import ParameterError
from mergekit_select.selection.draws import stream_key
from tests import reference

SEEDS = st.integers(0, 2**63 - 1)
NAMES = st.text(max_size=40)


def test_reference_generator_gives_the_published_outputs_of_splitmix64() -> None:
    # The first outputs for seed 1234567, as implementations in many languages agree on.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [reference.splitmix64(1234567, n) for n in range(4)] == published


# Computed with tests/reference.py and frozen: recipes on hubs depend on these.
KNOWN = [
    (0, "", 0, 0, [24827, 5589, 38626, 25249, 59544, 7785, 5537, 20967]),
    (0, "", 0, 2**34 + 1, [51968, 62885, 894]),
    (42, "model.embed_tokens.weight", 0, 0, [16994, 21609, 2515, 14410, 29641, 38404]),
    (42, "model.embed_tokens.weight", 1, 0, [52157, 32167, 1668, 13809, 22047, 7695]),
    (2**63 - 1, "lm_head.weight", 2, 2**32 - 2, [29708, 12603, 17247, 33943, 886, 40272]),
    (1, "größe", 0, 5, [42316, 14608, 33251, 4392, 12246, 49996]),
]


@pytest.mark.parametrize(("seed", "name", "draw_round", "start", "expected"), KNOWN)
def test_known_answers(seed: int, name: str, draw_round: int, start: int, expected: Any) -> None:
    found = draw(start, start + len(expected), seed=seed, name=name, draw_round=draw_round)
    assert found.tolist() == expected


def test_known_keys() -> None:
    assert stream_key(0, "", 0) == stream_key(0, "") == 0x4E63382B2C6CCFB5
    assert stream_key(2**63 - 1, "model.layers.0.self_attn.q_proj.weight", 3) == 0x7F4411370CBE4A17


@settings(max_examples=60, deadline=None)
@given(
    SEEDS, NAMES, st.integers(0, 5), st.one_of(st.integers(0, 300), st.integers(2**32 - 9, 2**40)), st.integers(0, 50)
)
def test_draws_are_those_of_the_reference(seed: int, name: str, draw_round: int, start: int, count: int) -> None:
    found = draw(start, start + count, seed=seed, name=name, draw_round=draw_round)
    expected = [reference.draw(seed, name, draw_round, d) for d in range(start, start + count)]
    assert found.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**45), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_draws_do_not_depend_on_the_cuts(start: int, lengths: list[int]) -> None:
    whole = draw(start, start + sum(lengths), name="x")
    pieces = []
    for length in lengths:
        pieces.append(draw(start, start + length, name="x"))
        start += length
    assert torch.equal(torch.cat(pieces), whole)


def test_names_that_no_encoding_should_meet_still_have_draws() -> None:
    assert draw(0, 2, name="\ud800").tolist() == [reference.draw(0, "\ud800", 0, d) for d in range(2)]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ParameterError, match=rf"^seed must be an integer in \[0, 2\^63\), got {seed}$"):
        draw(0, 1, seed=seed)


def chi_square(draws: torch.Tensor, bins: int) -> float:
    """Chi-square of nearly equal bins, standardised: about normal with mean 0 and deviation 1 for good draws."""
    slots = torch.bincount(torch.arange(2**16) * bins >> 16, minlength=bins).double()
    observed = torch.bincount(draws.long() * bins >> 16, minlength=bins).double()
    expected = slots / 2**16 * draws.numel()
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("bins", [2, 3, 16, 1000, 2**16])
def test_draws_are_uniform(bins: int) -> None:
    assert abs(chi_square(draw(0, 2**22, seed=7, name="uniform"), bins)) < 4.5


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation in standard errors."""
    a, b = a.double() - 32767.5, b.double() - 32767.5
    return float((a * b).mean() / (65536**2 / 12) * a.numel() ** 0.5)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 4096, 2**17, 2**18, 2**20])
def test_draws_are_uncorrelated_along_a_tensor(lag: int) -> None:
    draws = draw(0, 2**22, seed=7, name="along")
    assert abs(correlation(draws[:-lag], draws[lag:])) < 4.5
    # so is the parity of their bits
    parity = (draws ^ (draws >> 1)) & 1
    pairs = torch.bincount(parity[:-lag] * 2 + parity[lag:], minlength=4).double() / (draws.numel() - lag)
    assert float((pairs - 0.25).abs().max()) < 4.5 * (3 / 16 / draws.numel()) ** 0.5


@pytest.mark.parametrize(
    "other",
    [dict(name="b"), dict(name="a", seed=1), dict(name="a", seed=2**62), dict(name="a", draw_round=1), dict(name="a0")],
)
def test_draws_are_uncorrelated_across_tensors_seeds_and_rounds(other: Any) -> None:
    first, second = draw(0, 2**20, name="a"), draw(0, 2**20, **other)
    assert abs(correlation(first, second)) < 4.5
    assert abs(chi_square((first - second) % 2**16, 2**8)) < 4.5


def test_a_big_endian_machine_is_refused() -> None:
    code = "import sys; sys.byteorder = 'big'; import mergekit_select.selection.draws"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "draws version 1 read 64-bit words as four 16-bit lanes in little-endian order" in done.stderr
    assert "and this machine is big-endian: its merges would have other bits" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("start", [0, 3, 2**33 - 1])
def test_an_accelerator_draws_the_same(start: int) -> None:
    on_cpu = draw(start, start + 10**6, seed=5, name="gpu")
    assert torch.equal(draw(start, start + 10**6, seed=5, name="gpu", device="cuda").cpu(), on_cpu)
