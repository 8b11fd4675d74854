"""The final models beside each other: one row for each way of making a model, and the differences between rows."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from examples.order_study.analysis.bootstrap import bootstrap
from examples.order_study.measured import Floats, Integers, Measured, Measurements
from examples.order_study.model import Kind
from examples.order_study.settings import SAME_ORDER, SAME_ORDER_AVERAGE, Measuring
from examples.order_study.sources import Frozen, unset

SINGLE = "sub-models, mean"
BEST = "sub-models, best"

Measure = Literal["loss", "exact_match"]


class Row(Frozen):
    """What the table says of one way of making a model, over the models that were made in this way."""

    label: str
    kind: Kind
    models: tuple[str, ...]
    loss: float  # held-out, in nats per token; the mean over the models
    loss_deviation: float | None  # standard deviation over the models; None for one model
    loss_least: float
    loss_greatest: float
    perplexity: float  # of the mean loss
    exact_match: float | None  # share of right answers, the mean over the models
    exact_match_deviation: float | None
    equal_to_base: float | None  # share of parameters, the mean over the models
    distance: float | None = Field(default=None, exclude_if=unset)  # from the base, the mean over the models


class Difference(Frozen):
    """One row less another, over the same held-out samples."""

    measure: Measure
    row: str
    against: str
    estimate: float
    low: float
    high: float
    p: float
    told: bool  # whether the interval excludes 0


@dataclass(frozen=True)
class Group:
    """The final models that were made in one way."""

    label: str
    kind: Kind
    models: tuple[Measured, ...]

    def totals(self) -> Floats:
        """[n] nats on each held-out sample, the mean over the models."""
        mean: Floats = np.mean([one.held_out.total for one in self.models], axis=0)
        return mean

    def right(self) -> Floats | None:
        """[n] share of the models that answer each held-out sample rightly, or None where not measured."""
        answers = [one.exact for one in self.models if one.exact is not None]
        return np.mean(answers, axis=0) if answers and len(answers) == len(self.models) else None

    def row(self) -> Row:
        """What the table says of them."""
        losses = [one.held_out.mean() for one in self.models]
        answers = [float(one.exact.mean()) for one in self.models if one.exact is not None]
        equal = [one.equal_to_base for one in self.models if one.equal_to_base is not None]
        distances = [one.distance for one in self.models if one.distance is not None]
        loss = float(np.mean(losses))
        return Row(
            label=self.label,
            kind=self.kind,
            models=tuple(one.model.name for one in self.models),
            loss=loss,
            loss_deviation=_deviation(losses),
            loss_least=min(losses),
            loss_greatest=max(losses),
            perplexity=math.exp(loss),
            exact_match=float(np.mean(answers)) if answers else None,
            exact_match_deviation=_deviation(answers),
            equal_to_base=float(np.mean(equal)) if equal else None,
            distance=float(np.mean(distances)) if distances else None,
        )


def groups(measurements: Measurements) -> list[Group]:
    """Group the final models: base, sub-models, the best of them, and each kind of merge over its seeds."""
    singles = measurements.final("sub-model")
    best = best_of(singles)
    result = [
        Group("base", "base", measurements.final("base")),
        Group(SINGLE, "sub-model", singles),
        Group(f"{BEST} ({best.model.name})", "sub-model", (best,)),
    ]
    kinds: tuple[Kind, ...] = ("average", "selection", "resampling", "control")
    for kind in kinds:
        # Of resampling, those of few rounds first; until it differs is any number of them.
        models = sorted(measurements.final(kind), key=lambda one: one.model.rounds or math.inf)
        for label in dict.fromkeys(one.model.label for one in models):
            result.append(Group(label, kind, tuple(one for one in models if one.model.label == label)))
    return [group for group in result if group.models]


def best_of(singles: Sequence[Measured]) -> Measured:
    """The sub-model of the lowest loss: on the samples for validation, or else on the very ones it is measured on."""
    return min(singles, key=lambda one: (one.validation or one.held_out).mean())


def differences(every: list[Group], measuring: Measuring) -> list[Difference]:
    """The differences in held-out loss, and in right answers where these were measured."""
    compared = _pairs(every)
    if not compared:
        return []
    tokens = every[0].models[0].held_out.tokens
    losses = [(one, other, one.totals() - other.totals()) for one, other in compared]
    result = _differences("loss", losses, tokens, measuring)
    answers = []
    for one, other in compared:
        right, other_right = one.right(), other.right()
        if right is not None and other_right is not None:
            answers.append((one, other, right - other_right))
    if answers:
        result += _differences("exact_match", answers, np.ones(len(answers[0][2]), np.int64), measuring)
    return result


def _pairs(every: list[Group]) -> list[tuple[Group, Group]]:
    """The comparisons that are made: each merge against what is simpler than it, and against the controls.

    The average of runs of one order is also held against these runs, as the average of the sub-models is against them.
    Of the models from elsewhere, the first is what the rest of them is held against.
    """
    simpler: dict[Kind, tuple[Kind, ...]] = {
        "average": ("sub-model", "control"),
        "selection": ("sub-model", "average", "control"),
        "resampling": ("sub-model", "average", "selection", "control"),
    }
    same_order = [one for label in (SAME_ORDER_AVERAGE, SAME_ORDER) for one in every if one.label == label]
    elsewhere = [one for one in every if one.models[0].model.elsewhere is not None]
    return [
        *((one, other) for one in every for kind in simpler.get(one.kind, ()) for other in every if other.kind == kind),
        *itertools.pairwise(same_order),
        *((one, elsewhere[0]) for one in elsewhere[1:]),
    ]


def _differences(
    measure: Measure, compared: list[tuple[Group, Group, Floats]], weights: Integers, measuring: Measuring
) -> list[Difference]:
    columns = np.stack([column for _, _, column in compared], axis=1)
    intervals = bootstrap(columns, weights, measuring.bootstrap, measuring.seed, measuring.confidence)
    return [
        Difference(
            measure=measure,
            row=one.label,
            against=other.label,
            estimate=interval.estimate,
            low=interval.low,
            high=interval.high,
            p=interval.p,
            told=interval.excludes_zero,
        )
        for (one, other, _), interval in zip(compared, intervals, strict=True)
    ]


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
