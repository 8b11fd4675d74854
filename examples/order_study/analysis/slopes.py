"""Slopes and binned means of loss over position: pure functions on arrays.

Arrays of shape [n, K] hold n samples under K orders. Positions lie in [0, 1]: 0 is the first batch of an epoch, 1 the
last one, so that a slope is in nats per token per length of an epoch.

**Within a sample.** Samples differ in difficulty far more than position changes them, so a slope over the samples of
one order is mostly noise. As each sample has another position under each order, it can be compared with itself:

    loss[i, k] = difficulty[i] + level[k] + slope * position[i, k] + error[i, k]

least squares with an effect for each sample and for each order. In a table without gaps the effects drop out when loss
and position are centred on the means of sample and order (`centred`); the slope is then that of one on the other.

**Standard errors.** Errors are not independent. Those of one sample under several orders share what is peculiar to the
sample; those of samples that were in one batch share what that training step did, and their position as well, which
makes the plain formula far too sure of itself (Moulton 1990). Standard errors that are robust against both sum the
products of residual times regressor over all pairs that may be correlated (Liang & Zeger 1986; Cameron & Miller 2015,
"A Practitioner's Guide to Cluster-Robust Inference", sections II and III). Here the pairs are those of one sample, and
those of two samples that were in one batch under any order:

    V = sum over pairs (i, j) of s[i] s[j] / (sum of x^2)^2,   s[i] = sum over k of x[i, k] residual[i, k]

with x the centred position. Where the composition of the batches is fixed, this is clustering by batch; where it is
redrawn, it is clustering in as many ways as there are orders (Cameron, Gelbach & Miller 2011). Taking the sum over
orders first makes s[i] free of the sample's mean error, which residuals of centred data would otherwise smear over the
orders. With several ways V can come out small or negative by chance, so it is kept from falling below that of
clustering by sample alone. Corrections for small samples, and t quantiles with G - 1 degrees of freedom, G being the
number of clusters (batches in an epoch; samples where no clusters are given), as in section VI of Cameron & Miller.
The effects of samples lie within clusters, and hence do not count as estimated parameters (section III).

What the errors do not cover: each order was trained once, and what is found holds for these orders.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from examples.order_study.measured import Floats, Integers

_ROUNDING = 1e-12  # relative; what is left of equal numbers after centring must not pass for a trend
_CELLS = 1 << 22  # of the largest temporary array


@dataclass(frozen=True)
class Slope:
    """The change of loss over the length of an epoch, in nats per token."""

    estimate: float
    error: float  # standard error
    low: float  # of the confidence interval
    high: float
    p: float  # two-sided, of the hypothesis that there is no trend
    freedom: int  # degrees of freedom


@dataclass(frozen=True)
class Bin:
    """A mean over the samples seen in one stretch of an epoch."""

    position: float  # mean position of these samples
    mean: float
    low: float | None  # of the pointwise confidence band; None for a single sample
    high: float | None
    samples: int


def centred(values: Floats) -> Floats:
    """Take the means of samples and of orders away from values of shape [n, K]."""
    result: Floats = values - values.mean(axis=1, keepdims=True)
    result -= result.mean(axis=0, keepdims=True)
    result[np.abs(result) <= _ROUNDING * np.abs(values).max()] = 0.0
    return result


def against_others(losses: Floats) -> Floats:
    """Each loss less the mean loss of the same sample under the other orders, the levels of orders taken away.

    This is `centred` times K / (K - 1): the mean of a sample contains the very loss it is taken from, so that merely
    centred losses would show a trend flatter than it is, by a third for K = 3.
    """
    orders = losses.shape[1]
    result: Floats = centred(losses) * (orders / (orders - 1))
    return result


def raw_slope(
    losses: Floats, positions: Floats, clusters: Integers | None = None, confidence: float = 0.95
) -> Slope | None:
    """The slope of loss on position by plain least squares, whatever the samples' difficulty.

    Args:
        losses: [n, K]; one order is [n, 1].
        positions: [n, K] in [0, 1].
        clusters: [n, K]; samples that have an entry of some column in common may have errors in common: the index of
            the batch. None: no two samples do, which leaves errors robust against heteroscedasticity and, for more
            than one order, clustered by sample.
        confidence: Of the interval.

    Returns:
        None where there is nothing to tell a slope from: one cluster, or a position that is the same for all.
    """
    centred_positions = [positions - positions.mean()]
    return _slopes(losses - losses.mean(), centred_positions, clusters, confidence, parameters=2, absorbed=0)[0]


def within_slope(
    losses: Floats, positions: Floats, clusters: Integers | None = None, confidence: float = 0.95
) -> Slope | None:
    """The slope of loss on position, each sample compared with itself; see the top of this module.

    Arguments and result are those of `raw_slope`; takes two orders or more.
    """
    return within_slopes(losses, (positions,), clusters, confidence)[0]


def within_slopes(
    losses: Floats, regressors: Sequence[Floats], clusters: Integers | None = None, confidence: float = 0.95
) -> tuple[Slope | None, ...]:
    """The slopes of loss on several things at once, each sample compared with itself: what each adds to the others.

    Arguments are those of `within_slope`, with `regressors` of shape [n, K] each. With one regressor it is the same.

    Returns:
        A slope for each regressor; None for all where they cannot be told apart.
    """
    samples, orders = losses.shape
    return _slopes(
        centred(losses),
        [centred(one) for one in regressors],
        clusters,
        confidence,
        parameters=len(regressors) + orders,
        absorbed=samples - 1,
    )


def binned_means(values: Floats, positions: Floats, bins: int, confidence: float = 0.95) -> tuple[Bin, ...]:
    """Mean values of shape [n, K] in equal stretches of the epoch; stretches in which there is none are left out.

    The bands are pointwise, from standard errors clustered by sample. They show how sure each mean is for itself; the
    test of a trend is the slope, which also allows for what the samples of a batch have in common.
    """
    samples, orders = values.shape
    # An edge that rounding has moved down would fall into the bin before.
    bin_of = np.minimum(np.floor(positions * bins + 1e-9).astype(np.int64), bins - 1).ravel()
    flat = values.ravel()
    counts = np.bincount(bin_of, minlength=bins)
    safe = np.maximum(counts, 1)
    means = np.bincount(bin_of, flat, bins) / safe
    places = np.bincount(bin_of, positions.ravel(), bins) / safe
    cell = bin_of * samples + np.repeat(np.arange(samples), orders)
    scores = np.bincount(cell, flat - means[bin_of], bins * samples).reshape(bins, samples)
    present = np.bincount(cell, minlength=bins * samples).reshape(bins, samples) > 0
    clusters = present.sum(axis=1)
    result = []
    for b in np.flatnonzero(counts):
        half: float | None = None
        if clusters[b] > 1:
            variance = (scores[b] ** 2).sum() / counts[b] ** 2 * clusters[b] / (clusters[b] - 1)
            half = float(np.sqrt(variance) * stats.t.ppf((1 + confidence) / 2, clusters[b] - 1))
        mean = float(means[b])
        low, high = (None, None) if half is None else (mean - half, mean + half)
        result.append(Bin(float(places[b]), mean, low, high, int(clusters[b])))
    return tuple(result)


def _slopes(
    outcome: Floats,
    regressors: Sequence[Floats],
    clusters: Integers | None,
    confidence: float,
    parameters: int,
    absorbed: int,
) -> tuple[Slope | None, ...]:
    """One on the others, all centred; `absorbed` counts the effects of samples beside the other parameters."""
    if clusters is None:
        clusters = np.arange(len(outcome))[:, None]
    groups = min(len(np.unique(column)) for column in clusters.T)
    products = np.array([[float((one * other).sum()) for other in regressors] for one in regressors])
    spreads = np.diag(products)
    untold: tuple[Slope | None, ...] = (None,) * len(regressors)
    if groups < 2 or spreads.min() <= _ROUNDING or outcome.size - parameters - absorbed < 1:
        return untold
    scale = np.sqrt(spreads)
    if np.linalg.cond(products / np.outer(scale, scale)) > 1 / _ROUNDING:
        return untold
    inverse = np.linalg.inv(products)
    estimates = inverse @ [float((one * outcome).sum()) for one in regressors]
    residual = outcome - sum(estimate * one for estimate, one in zip(estimates, regressors, strict=True))
    scores = np.stack([(one * residual).sum(axis=1) for one in regressors], axis=1) @ inverse
    freedom = groups - 1
    correction = groups / freedom * (outcome.size - 1) / (outcome.size - parameters)
    result: list[Slope | None] = []
    for estimate, own in zip(map(float, estimates), scores.T, strict=True):
        variance = max(_sum_over_pairs(own, clusters), float((own**2).sum()))
        error = float(np.sqrt(correction * variance))
        half = error * float(stats.t.ppf((1 + confidence) / 2, freedom))
        p = float(2 * stats.t.sf(abs(estimate) / error, freedom)) if error else float(estimate == 0)
        result.append(Slope(estimate, error, estimate - half, estimate + half, p, freedom))
    return tuple(result)


def _sum_over_pairs(scores: Floats, clusters: Integers) -> float:
    """The sum of s[i] s[j] over all pairs that have an entry of some column in common, each pair once."""
    columns = [np.unique(column, return_inverse=True)[1] for column in clusters.T]
    sizes = [column.max() + 1 for column in columns]
    offsets = np.cumsum([0, *sizes[:-1]])
    samples, ways = clusters.shape
    member = sparse.csr_array(
        (
            np.ones(samples * ways),
            (np.stack(columns, axis=1) + offsets).ravel(),
            np.arange(samples + 1) * ways,
        ),
        shape=(samples, sum(sizes)),
    )
    total = 0.0
    rows = max(1, _CELLS // samples)
    for start in range(0, samples, rows):
        shared = (member[start : start + rows] @ member.T) > 0
        total += float(scores[start : start + rows] @ (shared @ scores))
    return total
