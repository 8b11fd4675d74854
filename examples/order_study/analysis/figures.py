"""The figures, drawn from the results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.order_study.analysis.imbalance import Anchor, Trend
from examples.order_study.analysis.results import Results, StepCurve
from examples.order_study.analysis.slopes import Bin
from examples.order_study.model import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which the colour-blind can tell apart; each kind of model has one, and a marker of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v")
_ANCHOR, _OTHERS = 0, 1
_NUMBERS: dict[Kind, int] = {"sub-model": _ANCHOR, "average": 2, "selection": 3, "resampling": 4}
_LOSS = "training loss (nats per token)"


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw all figures that there are measurements for, as PNG files in `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    confidence = results.study.measuring.confidence
    drawn = []
    for trend in results.trends:
        drawn.append(_save(_trend(trend, confidence), folder / f"position-{trend.epoch}-epoch.png"))
    if results.anchor is not None:
        drawn.append(_save(_anchor(results.anchor, confidence), folder / "anchor.png"))
    if results.along_steps:
        drawn.append(_save(_steps(results.along_steps), folder / "steps.png"))
    return drawn


def _trend(trend: Trend, confidence: float) -> Figure:
    figure, (raw, within) = _panels(2)
    for order in trend.orders:
        _line(raw, order.bins, color="0.7", linewidth=0.9, label=None if order is not trend.orders[0] else "each order")
    _curve(raw, trend.raw_bins, 0, f"all orders, {confidence:.0%} band", band=True)
    raw.set_title("samples as they are", fontsize=10)
    raw.set_ylabel(_LOSS)
    within.axhline(0, color="0.6", linewidth=0.8)
    _curve(within, trend.within_bins, 0, f"all orders, {confidence:.0%} band", band=True)
    if trend.within is not None:
        slope = trend.within
        # The positions of an epoch have a mean of a half, where the centred losses have theirs.
        ends = [-slope.estimate / 2, slope.estimate / 2]
        interval = f"{slope.low:+.4f} to {slope.high:+.4f}"
        within.plot([0, 1], ends, color=_COLOURS[1], linestyle="--", label=f"slope {slope.estimate:+.4f} ({interval})")
    within.set_title("each sample against itself under the other orders", fontsize=10)
    within.set_ylabel("difference in training loss (nats per token)")
    for axis in (raw, within):
        axis.set_xlabel(f"position in the {trend.epoch} epoch (0: first batch, 1: last)")
        _legend(axis)
    return figure


def _anchor(anchor: Anchor, confidence: float) -> Figure:
    figure, (raw, against) = _panels(2)
    against.axhline(0, color="0.6", linewidth=0.8)
    for curve in anchor.curves:
        number = _OTHERS if curve.difference is None else _NUMBERS[curve.kind]
        _curve(raw, curve.bins, number, curve.label)
        if curve.difference is not None:
            # One band: those of the merges would lie on top of each other.
            band = number == _ANCHOR
            label = f"{curve.label}, {confidence:.0%} band" if band else curve.label
            _curve(against, curve.difference, number, label, band=band)
    raw.set_title("samples as they are", fontsize=10)
    raw.set_ylabel(_LOSS)
    against.set_title("less the mean of the other sub-models", fontsize=10)
    against.set_ylabel("difference in training loss (nats per token)")
    for axis in (raw, against):
        axis.set_xlabel(f"position in the first epoch of {anchor.order} (0: first batch, 1: last)")
        _legend(axis)
    return figure


def _steps(curves: Sequence[StepCurve]) -> Figure:
    figure, (plain, against) = _panels(2)
    singles = {point.step: point.loss for curve in curves if curve.kind == "sub-model" for point in curve.points}
    for curve in curves:
        single = curve.kind == "sub-model"
        number = _OTHERS if single else _NUMBERS[curve.kind]
        label = f"{curve.label}, mean and range" if single else curve.label
        for axis, less in ((plain, dict.fromkeys(singles, 0.0)), (against, singles)):
            points = [point for point in curve.points if point.step in less]
            steps = [point.step for point in points]
            axis.plot(steps, [point.loss - less[point.step] for point in points], label=label, **_style(number))
            if single:
                low = [point.least - less[point.step] for point in points]
                high = [point.greatest - less[point.step] for point in points]
                axis.fill_between(steps, low, high, color=_COLOURS[number], alpha=0.2, linewidth=0)
    plain.set_title("as it is", fontsize=10)
    plain.set_ylabel("held-out loss (nats per token)")
    against.set_title("less the mean of the sub-models at the same step", fontsize=10)
    against.set_ylabel("difference in held-out loss (nats per token)")
    for axis in (plain, against):
        axis.set_xlabel("optimiser steps of each sub-model")
        _legend(axis)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it looks for a display and keeps every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0 * count, 4.6), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.grid(color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.ticklabel_format(axis="y", useOffset=False)
    return figure, axes


def _curve(axis: Axes, bins: Sequence[Bin], number: int, label: str, band: bool = False) -> None:
    _line(axis, bins, label=label, **_style(number))
    if band:
        # A bin of one sample has no band of its own.
        low = [b.mean if b.low is None else b.low for b in bins]
        high = [b.mean if b.high is None else b.high for b in bins]
        axis.fill_between([b.position for b in bins], low, high, color=_COLOURS[number], alpha=0.2, linewidth=0)


def _line(axis: Axes, bins: Sequence[Bin], **style: Any) -> None:
    axis.plot([b.position for b in bins], [b.mean for b in bins], **style)


def _style(number: int) -> dict[str, Any]:
    # Thinner and smaller one by one, so that curves that lie on one another are all seen.
    return {
        "color": _COLOURS[number],
        "marker": _MARKERS[number],
        "markersize": 7.5 - 1.2 * number,
        "linewidth": 2.4 - 0.38 * number,
    }


def _legend(axis: Axes) -> None:
    # Above the panel's frame would take room from it; below the curves it is in nobody's way.
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    # Without the version of matplotlib in the file.
    figure.savefig(path, format="png", metadata={"Software": None})
    return path
