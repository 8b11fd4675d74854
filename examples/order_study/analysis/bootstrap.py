"""Bootstrap intervals of the differences between models on the same samples: pure functions on arrays."""

from dataclasses import dataclass

import numpy as np

from examples.order_study.measured import Floats, Integers

_CELLS = 1 << 22  # of the largest temporary array


@dataclass(frozen=True)
class Interval:
    """A difference, with its percentile bootstrap interval."""

    estimate: float
    low: float
    high: float
    p: float  # two-sided: twice the share of resamples on the rarer side of 0, both sides counting 0

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference can be told."""
        return not self.low <= 0 <= self.high


def bootstrap(differences: Floats, weights: Integers, resamples: int, seed: int, confidence: float) -> list[Interval]:
    """Percentile bootstrap of paired differences, drawing samples with replacement (Efron & Tibshirani 1993, ch. 13).

    All columns are resampled alike. The statistic is the ratio of sums that defines a loss per token, so long samples
    weigh more, and its denominator varies with the samples drawn.

    Args:
        differences: [n, c] of the totals of c pairs of models on each sample.
        weights: [n] the denominator: tokens for losses, ones for shares of right answers.
        resamples: How many.
        seed: Of the draws.
        confidence: Of the intervals.
    """
    samples = len(weights)
    generator = np.random.default_rng(seed)
    drawn = np.empty((resamples, differences.shape[1]))
    rows = max(1, _CELLS // samples)
    for start in range(0, resamples, rows):
        some = min(rows, resamples - start)
        counts = generator.multinomial(samples, np.full(samples, 1 / samples), size=some).astype(np.float64)
        # Not `@`: its sums depend on the number of threads, and the same measurements are to give the same results.
        sums = np.einsum("rn,nc->rc", counts, differences)
        drawn[start : start + some] = sums / np.einsum("rn,n->r", counts, weights)[:, None]
    estimates = differences.sum(axis=0) / weights.sum()
    tail = (1 - confidence) / 2
    lows, highs = np.quantile(drawn, [tail, 1 - tail], axis=0)
    rarer = np.minimum((drawn <= 0).sum(axis=0), (drawn >= 0).sum(axis=0))
    ps = np.minimum(1.0, 2 * (rarer + 1) / (resamples + 1))
    return [Interval(*map(float, column)) for column in zip(estimates, lows, highs, ps, strict=True)]
