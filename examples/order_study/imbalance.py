"""What position in the epoch does to the loss of a fine-tuning sample, under the sub-models and under the merges."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from order_study.comparisons import AVERAGE, SELECTION, resampling_label
from order_study.measurements import Floats, Integers, Measured, Measurements, ModelKind, Positions
from order_study.settings import Measuring
from order_study.statistics import (
    Bin,
    Slope,
    against_others,
    binned_means,
    raw_slope,
    within_slope,
)


class OrderTrend(BaseModel):
    """Loss over position under one order, the samples as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: str
    slope: Slope | None
    bins: tuple[Bin, ...]


class Trend(BaseModel):
    """Loss over position in one epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: Literal["first", "last"]
    orders: tuple[OrderTrend, ...]
    raw: Slope | None  # over all samples of all orders
    raw_bins: tuple[Bin, ...]
    within: Slope | None  # each sample compared with itself under the other orders
    within_bins: tuple[Bin, ...]


class AnchorCurve(BaseModel):
    """The loss of a model, or the mean loss of several, on samples binned by their position under the anchor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    kind: ModelKind
    bins: tuple[Bin, ...]
    difference: tuple[Bin, ...] | None  # less the mean of the other sub-models; None for that mean itself
    slope: Slope | None  # of that difference


class Anchor(BaseModel):
    """The same samples under one sub-model, under the others and under the merges."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: str
    curves: tuple[AnchorCurve, ...]


def trends(measurements: Measurements) -> tuple[Trend, ...]:
    """Loss over position in the first epoch and, where there are several, in the last one."""
    singles = measurements.final("sub-model")
    if any(model.training is None for model in singles):
        return ()
    losses = np.stack([_per_token(model) for model in singles], axis=1)
    positions = measurements.positions
    measuring = measurements.study.measuring
    result = [_trend("first", losses, positions, np.stack([p.first for p in positions], axis=1), measuring)]
    if measurements.study.fine_tuning.epochs > 1:
        result.append(_trend("last", losses, positions, np.stack([p.last for p in positions], axis=1), measuring))
    return tuple(result)


def anchor(measurements: Measurements) -> Anchor | None:
    """Losses on samples binned by their position in the first epoch of the first order."""
    singles = measurements.final("sub-model")
    if any(model.training is None for model in singles):
        return None
    first, *others = singles
    compared = [
        _Compared(f"anchor ({first.name})", "sub-model", (first,)),
        _Compared(AVERAGE, "average", measurements.final("average")),
        _Compared(SELECTION, "selection", measurements.final("selection")),
    ]
    resampled = measurements.final("resampling")
    if resampled:
        # The one that resamples most; the others lie between it and selection.
        rounds = max((model.rounds for model in resampled), key=lambda r: np.inf if r is None else r)
        some = tuple(model for model in resampled if model.rounds == rounds)
        compared.append(_Compared(resampling_label(rounds), "resampling", some))
    where, measuring = measurements.positions[0], measurements.study.measuring
    clusters = where.first[:, None]
    positions = _scaled(clusters, where.batches)

    def binned(losses: Floats) -> tuple[Bin, ...]:
        return binned_means(losses[:, None], positions, measuring.bins, measuring.confidence)

    reference = _mean(others)
    label = "other sub-models, mean"
    curves = [AnchorCurve(label=label, kind="sub-model", bins=binned(reference), difference=None, slope=None)]
    for label, kind, models in compared:
        if models and all(model.training is not None for model in models):
            losses = _mean(models)
            slope = raw_slope((losses - reference)[:, None], positions, clusters, measuring.confidence)
            curves.append(
                AnchorCurve(
                    label=label, kind=kind, bins=binned(losses), difference=binned(losses - reference), slope=slope
                )
            )
    return Anchor(order=first.name, curves=tuple(curves))


class _Compared(NamedTuple):
    label: str
    kind: ModelKind
    models: tuple[Measured, ...]


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
        within=within_slope(losses, positions, batches, confidence),
        within_bins=binned_means(against_others(losses), positions, bins, confidence),
    )


def _scaled(batches: Integers, count: int) -> Floats:
    """Indices of batches as positions in [0, 1]."""
    return batches / max(1, count - 1)


def _mean(models: Sequence[Measured]) -> Floats:
    mean: Floats = np.mean([_per_token(model) for model in models], axis=0)
    return mean


def _per_token(model: Measured) -> Floats:
    assert model.training is not None, model.name  # callers have looked
    return model.training.per_token()
