"""The order study's statistics, on made-up data of which the answer is known, and against slow and obvious forms."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from examples.order_study.analysis import bootstrap as bootstrap_module
from examples.order_study.analysis import slopes as slopes_module
from examples.order_study.analysis.bootstrap import bootstrap
from examples.order_study.analysis.slopes import (
    Slope,
    against_others,
    binned_means,
    centred,
    raw_slope,
    within_slope,
    within_slopes,
)
from examples.order_study.measured import Floats, Integers

SLOPE = -0.3
COMPOSITIONS = ("redrawn", "fixed")
seeds = st.integers(0, 2**32 - 1)


def batches_of(generator: np.random.Generator, samples: int, orders: int, size: int, composition: str) -> Integers:
    """[samples, orders] index of the batch in which a sample is seen."""
    count = -(-samples // size)
    if composition == "fixed":
        batch = generator.permutation(samples) // size
        return np.stack([generator.permutation(count)[batch] for _ in range(orders)], axis=1)
    return np.stack([generator.permutation(samples) // size for _ in range(orders)], axis=1)


def losses_at(
    generator: np.random.Generator,
    batches: Integers,
    slope: float = SLOPE,
    noise: float = 0.0,
    shock: float = 0.0,
) -> tuple[Floats, Floats]:
    """Losses and positions: samples of very different difficulty, orders of different level, a trend, errors."""
    samples, orders = batches.shape
    positions = batches / batches.max()
    difficulty, level = generator.normal(0, 3, (samples, 1)), generator.normal(0, 0.1, orders)
    shocks = np.take_along_axis(generator.normal(0, 1, (batches.max() + 1, orders)), batches, axis=0)
    errors = noise * generator.normal(size=batches.shape) + shock * shocks
    return difficulty + level + slope * positions + errors, positions


def known(slope: Slope | None) -> Slope:
    assert slope is not None
    return slope


# Slopes


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("orders", [2, 3, 5])
def test_without_noise_the_planted_slope_is_found_within_samples_and_missed_by_the_raw_one(
    composition: str, orders: int
) -> None:
    generator = np.random.default_rng(1)
    batches = batches_of(generator, 120, orders, 8, composition)
    losses, positions = losses_at(generator, batches)
    within, raw = known(within_slope(losses, positions, batches)), known(raw_slope(losses, positions, batches))
    assert within.estimate == pytest.approx(SLOPE, abs=1e-12)
    assert within.p < 1e-6
    assert abs(raw.estimate - SLOPE) > 0.01
    assert raw.error > 1e6 * within.error


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("orders", [2, 3])
def test_intervals_cover_the_planted_slope_as_often_as_they_say_though_batches_share_errors(
    composition: str, orders: int
) -> None:
    generator = np.random.default_rng(2)
    covered = covered_by_sample = 0
    for _ in range(200):
        batches = batches_of(generator, 240, orders, 8, composition)
        losses, positions = losses_at(generator, batches, noise=1, shock=1)
        slope, by_sample = known(within_slope(losses, positions, batches)), known(within_slope(losses, positions))
        covered += slope.low <= SLOPE <= slope.high
        covered_by_sample += by_sample.low <= SLOPE <= by_sample.high
    assert 0.9 <= covered / 200 <= 0.99
    assert covered_by_sample / 200 < 0.85  # which is what the clusters are for


@pytest.mark.parametrize("within", [False, True])
def test_without_a_trend_p_values_are_uniform(within: bool) -> None:
    generator = np.random.default_rng(3)
    found = []
    for _ in range(400):
        batches = batches_of(generator, 150, 3, 1, "redrawn")
        losses, positions = losses_at(generator, batches, slope=0, noise=1)
        found.append(known((within_slope if within else raw_slope)(losses, positions)).p)
    assert stats.kstest(found, "uniform").pvalue > 0.01


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_without_a_trend_few_are_found(composition: str) -> None:
    generator = np.random.default_rng(4)
    found = 0
    for _ in range(200):
        batches = batches_of(generator, 160, 3, 8, composition)
        losses, positions = losses_at(generator, batches, slope=0, noise=1, shock=0.5)
        found += known(within_slope(losses, positions, batches)).p < 0.05
    assert 0.005 <= found / 200 <= 0.1


def slow_slopes(losses: Floats, regressors: list[Floats], clusters: Integers, confidence: float) -> list[Slope]:
    """The same by least squares with a dummy for each sample and each order, and a loop over pairs."""
    samples, orders = losses.shape
    sample, order = np.divmod(np.arange(samples * orders), orders)
    dummies = np.concatenate([np.eye(samples)[sample], np.eye(orders)[order]], axis=1)
    columns = np.stack([one.ravel() for one in regressors], axis=1)
    design = np.concatenate([columns, dummies], axis=1)
    coefficients = np.linalg.lstsq(design, losses.ravel())[0]
    residuals = losses.ravel() - design @ coefficients
    own = columns - dummies @ np.linalg.lstsq(dummies, columns)[0]
    weights = own @ np.linalg.inv(own.T @ own)  # the estimates are these times the losses
    groups = min(len(set(column)) for column in clusters.T.tolist())
    found = []
    for place, estimate in enumerate(map(float, coefficients[: len(regressors)])):
        scores = [float((weights[:, place] * residuals)[sample == i].sum()) for i in range(samples)]
        variance = 0.0
        for i in range(samples):
            for j in range(samples):
                if any(clusters[i] == clusters[j]):
                    variance += scores[i] * scores[j]
        variance = max(variance, sum(score**2 for score in scores))
        variance *= groups / (groups - 1) * (losses.size - 1) / (losses.size - len(regressors) - orders)
        error = variance**0.5
        half = error * stats.t.ppf(0.5 + confidence / 2, groups - 1)
        p = 2 * stats.t.cdf(-abs(estimate / error), groups - 1)
        found.append(Slope(estimate, error, estimate - half, estimate + half, float(p), groups - 1))
    return found


def slow_slope(losses: Floats, positions: Floats, clusters: Integers, confidence: float) -> Slope:
    return slow_slopes(losses, [positions], clusters, confidence)[0]


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 7), st.sampled_from(COMPOSITIONS), st.sampled_from([0.5, 0.95]))
def test_slope_error_and_p_are_those_of_dummies_and_a_loop_over_pairs(
    seed: int, orders: int, size: int, composition: str, confidence: float
) -> None:
    generator = np.random.default_rng(seed)
    batches = batches_of(generator, 23, orders, size, composition)
    losses, positions = losses_at(generator, batches, noise=1, shock=1)
    assume(centred(positions).any())  # few batches may by chance come in one order everywhere
    fast = known(within_slope(losses, positions, batches, confidence))
    slow = slow_slope(losses, positions, batches, confidence)
    assert fast.freedom == slow.freedom
    for name in ("estimate", "error", "low", "high", "p"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name), rel=1e-7, abs=1e-9), name


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 4), st.integers(1, 7))
def test_slopes_on_several_things_are_those_of_dummies_and_a_loop_over_pairs(seed: int, orders: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    batches = batches_of(generator, 23, orders, size, "redrawn")
    losses, positions = losses_at(generator, batches, noise=1, shock=1)
    others = [generator.normal(size=batches.shape) + 0.5 * positions for _ in range(2)]
    fast = within_slopes(losses, [positions, *others], batches)
    slow = slow_slopes(losses, [positions, *others], batches, 0.95)
    for one, other in zip(fast, slow, strict=True):
        for name in ("estimate", "error", "low", "high", "p"):
            assert getattr(known(one), name) == pytest.approx(getattr(other, name), rel=1e-6, abs=1e-9), name


def test_what_one_thing_explains_is_not_put_down_to_another() -> None:
    generator = np.random.default_rng(8)
    batches = batches_of(generator, 200, 3, 8, "redrawn")
    positions = batches / batches.max()
    rates = 1 - 0.8 * positions**2
    losses = generator.normal(0, 3, (200, 1)) - 2.0 * rates + 0.01 * generator.normal(size=batches.shape)
    alone = known(within_slope(losses, positions, batches))
    assert not alone.low <= 0 <= alone.high  # position seems to explain what the rate does
    position, rate = within_slopes(losses, [positions, rates], batches)
    assert known(position).low <= 0 <= known(position).high
    assert known(rate).estimate == pytest.approx(-2, abs=0.01)


def test_things_that_go_together_cannot_be_told_apart() -> None:
    generator = np.random.default_rng(9)
    losses, positions = losses_at(generator, batches_of(generator, 60, 3, 4, "redrawn"), noise=1)
    assert within_slopes(losses, [positions, 2 * positions + 1]) == (None, None)


def test_samples_that_share_batches_in_two_orders_count_as_one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slopes_module, "_CELLS", 1)  # row by row
    generator = np.random.default_rng(6)
    clusters = np.stack([np.arange(12) // 4, np.arange(12) // 6], axis=1)
    losses, positions = losses_at(generator, batches_of(generator, 12, 2, 2, "redrawn"), noise=1)
    assert known(within_slope(losses, positions, clusters)).error == pytest.approx(
        slow_slope(losses, positions, clusters, 0.95).error
    )


def test_with_a_fixed_composition_errors_are_clustered_by_batch() -> None:
    generator = np.random.default_rng(7)
    batches = batches_of(generator, 200, 3, 8, "fixed")
    losses, positions = losses_at(generator, batches, noise=1, shock=2)
    by_any_order = known(within_slope(losses, positions, batches))
    by_batch = known(within_slope(losses, positions, batches[:, :1]))
    assert by_any_order == by_batch
    x, y = centred(positions), centred(losses)
    estimate = (x * y).sum() / (x * x).sum()
    scores = (x * (y - estimate * x)).sum(axis=1)
    sums = np.array([scores[batches[:, 0] == batch].sum() for batch in range(25)])
    expected = np.sqrt(25 / 24 * 599 / 596 * (sums**2).sum()) / (x * x).sum()
    assert by_batch.error == pytest.approx(expected)
    assert by_batch.freedom == 24


def test_errors_never_fall_below_those_clustered_by_sample() -> None:
    generator = np.random.default_rng(8)
    for _ in range(30):
        batches = batches_of(generator, 30, 3, 10, "redrawn")
        losses, positions = losses_at(generator, batches, noise=1)
        score_error = known(within_slope(losses, positions)).error / np.sqrt(30 / 29)
        assert known(within_slope(losses, positions, batches)).error >= score_error * np.sqrt(3 / 2) * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 4), st.sampled_from(COMPOSITIONS), st.floats(0.01, 100))
def test_the_slope_within_samples_is_blind_to_difficulty_level_and_names(
    seed: int, orders: int, composition: str, scale: float
) -> None:
    generator = np.random.default_rng(seed)
    batches = batches_of(generator, 24, orders, 4, composition)
    losses, positions = losses_at(generator, batches, noise=1)
    assume(centred(positions).any())
    slope = known(within_slope(losses, positions, batches))

    def same(other: Slope | None, factor: float = 1.0) -> None:
        assert known(other).estimate == pytest.approx(factor * slope.estimate, rel=1e-6, abs=1e-9 * factor)
        assert known(other).error == pytest.approx(factor * slope.error, rel=1e-6)
        assert known(other).p == pytest.approx(slope.p, rel=1e-5, abs=1e-9)

    same(within_slope(losses + generator.normal(0, 50, (24, 1)), positions, batches))
    same(within_slope(losses + generator.normal(0, 50, orders), positions, batches))
    relabelled = generator.permutation(orders)
    same(within_slope(losses[:, relabelled], positions[:, relabelled], batches[:, relabelled]))
    shuffled = generator.permutation(24)
    same(within_slope(losses[shuffled], positions[shuffled], batches[shuffled]))
    same(within_slope(losses, positions, 7 * batches + 3))
    same(within_slope(scale * losses, positions, batches), scale)
    same(within_slope(losses, positions / scale, batches), scale)


def test_with_two_orders_the_slope_is_that_of_the_differences() -> None:
    generator = np.random.default_rng(9)
    losses, positions = losses_at(generator, batches_of(generator, 60, 2, 4, "redrawn"), noise=1)
    expected = stats.linregress(positions[:, 1] - positions[:, 0], losses[:, 1] - losses[:, 0])
    assert known(within_slope(losses, positions)).estimate == pytest.approx(expected.slope)


def test_the_raw_slope_of_one_order_is_least_squares_with_robust_errors() -> None:
    generator = np.random.default_rng(10)
    losses, positions = losses_at(generator, batches_of(generator, 60, 1, 1, "redrawn"), noise=1)
    slope = known(raw_slope(losses, positions))
    x, y = positions[:, 0], losses[:, 0]
    expected = stats.linregress(x, y)
    assert slope.estimate == pytest.approx(expected.slope)
    design = np.stack([np.ones(60), x], axis=1)
    residuals = y - expected.intercept - expected.slope * x
    bread = np.linalg.inv(design.T @ design)
    meat = design.T @ (residuals[:, None] ** 2 * design) * 60 / 58  # MacKinnon & White's HC1
    assert slope.error == pytest.approx(np.sqrt((bread @ meat @ bread)[1, 1]))
    assert slope.freedom == 59


def test_equal_losses_under_all_orders_are_no_trend() -> None:
    generator = np.random.default_rng(11)
    batches = batches_of(generator, 50, 3, 5, "redrawn")
    losses = np.repeat(generator.normal(2, 0.7, (50, 1)), 3, axis=1)
    slope = known(within_slope(losses, batches / 9, batches))
    assert (slope.estimate, slope.error, slope.low, slope.high, slope.p) == (0, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("positions", "clusters"),
    [
        (np.zeros((6, 2)), np.zeros((6, 2), np.int64)),  # one batch
        (np.repeat(np.linspace(0, 1, 6)[:, None], 2, axis=1), None),  # all orders alike
        (np.array([[0.0, 1.0], [1.0, 0.0]]), None),  # a line through as many points as it takes
    ],
)
def test_no_slope_is_made_up_where_nothing_tells_it(positions: Floats, clusters: Integers | None) -> None:
    losses = np.random.default_rng(12).normal(size=positions.shape)
    assert within_slope(losses, positions, clusters) is None


# Bins


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 3), st.integers(1, 12), st.integers(1, 9))
def test_bins_are_means_of_those_that_fall_into_them(seed: int, orders: int, bins: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    batches = batches_of(generator, 20, orders, size, "redrawn")
    last = max(1, int(batches.max()))
    values, positions = generator.normal(size=batches.shape), batches / last
    found = binned_means(values, positions, bins)
    at = 0
    for number in range(bins):
        # In whole numbers: batch / last lies in [number / bins, (number + 1) / bins), the last bin closed.
        inside = np.minimum(batches * bins // last, bins - 1) == number
        if not inside.any():
            continue
        assert found[at].mean == pytest.approx(values[inside].mean())
        assert found[at].position == pytest.approx(positions[inside].mean())
        assert found[at].samples == inside.any(axis=1).sum()
        at += 1
    assert at == len(found)


def test_the_band_of_one_order_is_the_t_interval_of_the_mean() -> None:
    values = np.random.default_rng(13).normal(size=(30, 1))
    (one,) = binned_means(values, np.full((30, 1), 0.5), 1, 0.9)
    expected = stats.ttest_1samp(values[:, 0], 0).confidence_interval(0.9)
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))


def test_a_sample_that_falls_into_a_bin_under_all_orders_counts_once() -> None:
    values = np.random.default_rng(14).normal(size=(30, 1))
    (once,) = binned_means(values, np.zeros((30, 1)), 1)
    (thrice,) = binned_means(np.repeat(values, 3, axis=1), np.zeros((30, 3)), 1)
    assert (thrice.mean, thrice.low) == pytest.approx((once.mean, once.low))


def test_a_bin_of_one_sample_has_no_band() -> None:
    first, second = binned_means(np.array([[1.0], [2.0], [4.0]]), np.array([[0.0], [1.0], [1.0]]), 2)
    assert (first.mean, first.low, first.high, first.samples) == (1.0, None, None, 1)
    assert (second.mean, second.samples) == (3.0, 2)
    assert second.low is not None


def test_against_others_is_the_loss_less_the_mean_of_the_other_orders() -> None:
    generator = np.random.default_rng(15)
    losses = generator.normal(size=(17, 4))
    others = np.stack([np.delete(losses, k, axis=1).mean(axis=1) for k in range(4)], axis=1)
    expected = losses - others
    assert against_others(losses) == pytest.approx(expected - expected.mean(axis=0))


@pytest.mark.parametrize("orders", [2, 3])
def test_binned_comparisons_with_itself_show_the_planted_trend_in_full(orders: int) -> None:
    generator = np.random.default_rng(16)
    batches = batches_of(generator, 20_000, orders, 10, "redrawn")
    losses, positions = losses_at(generator, batches)
    for one in binned_means(against_others(losses), positions, 5):
        assert one.mean == pytest.approx(SLOPE * (one.position - 0.5), abs=0.006)


# Bootstrap


def test_identical_models_differ_by_exactly_nothing() -> None:
    tokens = np.random.default_rng(17).integers(1, 90, 300)
    (interval,) = bootstrap(np.zeros((300, 1)), tokens, 500, 0, 0.95)
    assert (interval.estimate, interval.low, interval.high, interval.p) == (0, 0, 0, 1)
    assert not interval.excludes_zero


def test_long_samples_weigh_more_and_a_difference_alike_everywhere_is_certain() -> None:
    tokens = np.array([1, 9, 90])
    per_token, constant = np.array([1.0, 0.0, 0.0]), np.full(3, -0.25)
    first, second = bootstrap(np.stack([per_token, constant], axis=1) * tokens[:, None], tokens, 500, 0, 0.95)
    assert first.estimate == pytest.approx(0.01)
    assert (second.estimate, second.low, second.high) == (-0.25, -0.25, -0.25)
    assert second.excludes_zero
    assert second.p == 2 / 501


def test_bootstrap_is_that_of_a_loop_over_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(18)
    tokens, differences = generator.integers(1, 90, 40), generator.normal(0.2, 1, (40, 3))
    found = bootstrap(differences, tokens, 200, 5, 0.8)
    draws = np.random.default_rng(5)
    ratios = []
    for _ in range(200):
        chosen = np.repeat(np.arange(40), draws.multinomial(40, [1 / 40] * 40))
        ratios.append(differences[chosen].sum(axis=0) / tokens[chosen].sum())
    for column, interval in enumerate(found):
        values = sorted(ratio[column] for ratio in ratios)
        assert interval.low == pytest.approx(np.quantile(values, 0.1))
        assert interval.high == pytest.approx(np.quantile(values, 0.9))
        below = sum(value <= 0 for value in values)
        assert interval.p == pytest.approx(min(1, 2 * (min(below, 200 - below) + 1) / 201))
    monkeypatch.setattr(bootstrap_module, "_CELLS", 100)
    assert bootstrap(differences, tokens, 200, 5, 0.8) == found  # however many at a time


def test_bootstrap_intervals_cover_as_often_as_they_say() -> None:
    generator = np.random.default_rng(19)
    covered = 0
    for _ in range(200):
        tokens = generator.integers(5, 60, 120)
        differences = (0.1 + generator.normal(0, 1, 120)) * tokens
        (interval,) = bootstrap(differences[:, None], tokens, 300, 0, 0.95)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


def test_the_sign_of_a_difference_turns_with_its_sides() -> None:
    generator = np.random.default_rng(20)
    tokens, difference = generator.integers(1, 90, 80), generator.normal(0.1, 1, 80)
    one, other = bootstrap(np.stack([difference, -difference], axis=1), tokens, 400, 0, 0.95)
    assert (one.estimate, one.p) == (-other.estimate, other.p)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
