"""What position in the epoch does to the loss of a fine-tuning sample, under the sub-models and under the merges."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from examples.order_study.analysis.slopes import (
    Bin,
    Slope,
    against_others,
    binned_means,
    raw_slope,
    within_slope,
    within_slopes,
)
from examples.order_study.measured import Floats, Integers, Measured, Measurements, Positions
from examples.order_study.model import Kind, drawn
from examples.order_study.settings import Measuring
from examples.order_study.sources import Frozen

RATE = "learning rate when seen"  # the cause beside position


class OrderTrend(Frozen):
    """Loss over position under one order, the samples as they are."""

    order: str
    slope: Slope | None
    bins: tuple[Bin, ...]


class Trend(Frozen):
    """Loss over position in one epoch."""

    epoch: Literal["first", "last"]
    orders: tuple[OrderTrend, ...]
    raw: Slope | None  # over all samples of all orders
    raw_bins: tuple[Bin, ...]
    within: Slope | None  # each sample compared with itself under the other orders
    within_bins: tuple[Bin, ...]


class Cause(Frozen):
    """What may explain that one order leaves a sample with another loss than the next: slopes within samples."""

    what: str
    alone: Slope | None
    together: Slope | None  # beside the other causes: what this one adds to them


class AnchorCurve(Frozen):
    """The loss of a model, or the mean loss of several, on samples binned by their position under the anchor."""

    label: str
    kind: Kind
    bins: tuple[Bin, ...]
    difference: tuple[Bin, ...] | None  # less the mean of the other sub-models; None for that mean itself
    slope: Slope | None  # of that difference


class Anchor(Frozen):
    """The same samples under one sub-model, under the others and under the merges."""

    order: str
    curves: tuple[AnchorCurve, ...]


def trends(measurements: Measurements) -> tuple[Trend, ...]:
    """Loss over position in the first epoch and, where there are several, in the last one that was completed."""
    singles, positions = measurements.final("sub-model"), measurements.positions
    if any(one.training is None for one in singles):
        return ()
    losses = np.stack([_per_token(one) for one in singles], axis=1)
    measuring, result = measurements.study.measuring, []
    if measurements.epochs:
        result.append(_trend("first", losses, positions, np.stack([p.first for p in positions], axis=1), measuring))
    if measurements.epochs > 1:
        result.append(_trend("last", losses, positions, np.stack([p.last for p in positions], axis=1), measuring))
    return tuple(result)


def causes(measurements: Measurements, found: Sequence[Trend]) -> tuple[Cause, ...]:
    """Position against learning rate: each alone, and all together, so that what the others explain is allowed for.

    After one epoch without warm-up learning rate and position go nearly together, and can hardly be told apart.
    Learning rates that are the same for all samples, as a constant one is, explain nothing, and are left out.

    Args:
        measurements: What was measured.
        found: The trends in it, which have the slopes on positions alone.
    """
    singles, positions = measurements.final("sub-model"), measurements.positions
    rates = [where.learning_rate for where in positions if where.learning_rate is not None]
    if not found or len(singles) < 2 or len(rates) < len(singles):
        return ()
    losses = np.stack([_per_token(one) for one in singles], axis=1)
    confidence = measurements.study.measuring.confidence
    seen = np.concatenate([where.seen for where in positions], axis=1)
    rate = np.stack(rates, axis=1)
    whats, alone, regressors = [], [], []
    for trend in found:
        batches = np.stack([p.first if trend.epoch == "first" else p.last for p in positions], axis=1)
        whats.append(f"position in the {trend.epoch} epoch")
        alone.append(trend.within)
        regressors.append(_scaled(batches, positions[0].batches))
    if np.ptp(rate, axis=1).any():
        whats.append(RATE)
        alone.append(within_slope(losses, rate, seen, confidence))
        regressors.append(rate)
    together = within_slopes(losses, regressors, seen, confidence)
    return tuple(Cause(what=w, alone=a, together=t) for w, a, t in zip(whats, alone, together, strict=True))


def anchor(measurements: Measurements) -> Anchor | None:
    """Losses on samples binned by their position in the first epoch of the first order."""
    singles = measurements.final("sub-model")
    if any(one.training is None for one in singles) or len(singles) < 2 or not measurements.epochs:
        return None
    first, *others = singles
    shown = [one for one in measurements.models if one.model in drawn(measurements.study) and one.training is not None]
    compared = [(f"anchor ({first.model.name})", first), *((one.model.label, one) for one in shown)]
    where, measuring = measurements.positions[0], measurements.study.measuring
    clusters = where.first[:, None]
    positions = _scaled(clusters, where.batches)

    def binned(losses: Floats) -> tuple[Bin, ...]:
        return binned_means(losses[:, None], positions, measuring.bins, measuring.confidence)

    reference = _mean(others)
    label = "other sub-models, mean"
    curves = [AnchorCurve(label=label, kind="sub-model", bins=binned(reference), difference=None, slope=None)]
    for label, one in compared:
        losses = _per_token(one)
        less = losses - reference
        slope = raw_slope(less[:, None], positions, clusters, measuring.confidence)
        curves.append(
            AnchorCurve(label=label, kind=one.model.kind, bins=binned(losses), difference=binned(less), slope=slope)
        )
    return Anchor(order=first.model.name, curves=tuple(curves))


def _trend(
    epoch: Literal["first", "last"],
    losses: Floats,
    orders: tuple[Positions, ...],
    batches: Integers,
    measuring: Measuring,
) -> Trend:
    positions = _scaled(batches, orders[0].batches)
    bins, confidence = measuring.bins, measuring.confidence
    columns = [(where.order, slice(k, k + 1)) for k, where in enumerate(orders)]
    several = len(orders) > 1  # with one, there is nothing to compare a sample with itself under
    return Trend(
        epoch=epoch,
        orders=tuple(
            OrderTrend(
                order=order,
                slope=raw_slope(losses[:, k], positions[:, k], batches[:, k], confidence),
                bins=binned_means(losses[:, k], positions[:, k], bins, confidence),
            )
            for order, k in columns
        ),
        raw=raw_slope(losses, positions, batches, confidence),
        raw_bins=binned_means(losses, positions, bins, confidence),
        within=within_slope(losses, positions, batches, confidence) if several else None,
        within_bins=binned_means(against_others(losses), positions, bins, confidence) if several else (),
    )


def _scaled(batches: Integers, count: int) -> Floats:
    """Indices of batches as positions in [0, 1]."""
    return batches / max(1, count - 1)


def _mean(models: Sequence[Measured]) -> Floats:
    mean: Floats = np.mean([_per_token(one) for one in models], axis=0)
    return mean


def _per_token(one: Measured) -> Floats:
    assert one.training is not None, one.model.name  # callers have looked
    return one.training.per_token()
