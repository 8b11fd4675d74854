"""The final models beside each other: one row for each way of making a model, and the differences between rows."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from order_study.bootstrap import bootstrap
from order_study.measurements import Floats, Integers, Measured, Measurements, ModelKind
from order_study.settings import Measuring

SINGLE = "sub-models, mean"
AVERAGE = "average"
SELECTION = "selection"

Measure = Literal["loss", "exact_match"]


class Row(BaseModel):
    """What the table says of one way of making a model, over the models that were made in this way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    kind: ModelKind
    models: tuple[str, ...]
    loss: float  # held-out, in nats per token; the mean over the models
    loss_deviation: float | None  # standard deviation over the models; None for one model
    loss_least: float
    loss_greatest: float
    perplexity: float  # of the mean loss
    exact_match: float | None  # share of right answers, the mean over the models
    exact_match_deviation: float | None
    equal_to_base: float | None  # share of parameters, the mean over the models


class Difference(BaseModel):
    """One row less another, over the same held-out samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    kind: ModelKind
    models: tuple[Measured, ...]

    def totals(self) -> Floats:
        """[n] nats on each held-out sample, the mean over the models."""
        mean: Floats = np.mean([model.held_out.total for model in self.models], axis=0)
        return mean

    def right(self) -> Floats | None:
        """[n] share of the models that answer each held-out sample rightly, or None where not measured."""
        answers = [model.exact for model in self.models if model.exact is not None]
        return np.mean(answers, axis=0) if answers and len(answers) == len(self.models) else None


def resampling_label(rounds: int | None) -> str:
    """The label of a resampling."""
    if rounds is None:
        return "resampling, until it differs"
    return f"resampling, {rounds} round{'s' * (rounds != 1)}"


def groups(measurements: Measurements) -> list[Group]:
    """Group the final models: base, sub-models, the best of them, and each kind of merge over its seeds."""
    singles = measurements.final("sub-model")
    best = min(singles, key=lambda model: model.held_out.mean())
    result = [
        Group("base", "base", measurements.final("base")),
        Group(SINGLE, "sub-model", singles),
        Group(f"sub-models, best ({best.name})", "sub-model", (best,)),
        Group(AVERAGE, "average", measurements.final("average")),
        Group(SELECTION, "selection", measurements.final("selection")),
    ]
    resampled = measurements.final("resampling")
    for rounds in sorted({model.rounds for model in resampled}, key=lambda r: math.inf if r is None else r):
        models = tuple(model for model in resampled if model.rounds == rounds)
        result.append(Group(resampling_label(rounds), "resampling", models))
    return [group for group in result if group.models]


def row(group: Group) -> Row:
    """What the table says of a group."""
    losses = [model.held_out.mean() for model in group.models]
    answers = [float(model.exact.mean()) for model in group.models if model.exact is not None]
    equal = [model.equal_to_base for model in group.models if model.equal_to_base is not None]
    loss = float(np.mean(losses))
    return Row(
        label=group.label,
        kind=group.kind,
        models=tuple(model.name for model in group.models),
        loss=loss,
        loss_deviation=_deviation(losses),
        loss_least=min(losses),
        loss_greatest=max(losses),
        perplexity=math.exp(loss),
        exact_match=float(np.mean(answers)) if answers else None,
        exact_match_deviation=_deviation(answers),
        equal_to_base=float(np.mean(equal)) if equal else None,
    )


def pairs(every: list[Group]) -> list[tuple[Group, Group]]:
    """The comparisons that are made: each merge against what is simpler than it."""
    singles = [group for group in every if group.kind == "sub-model"]
    average = [group for group in every if group.kind == "average"]
    selection = [group for group in every if group.kind == "selection"]
    simpler: dict[ModelKind, list[Group]] = {
        "average": singles,
        "selection": singles + average,
        "resampling": singles + average + selection,
    }
    return [(group, other) for group in every for other in simpler.get(group.kind, [])]


def differences(every: list[Group], measuring: Measuring) -> list[Difference]:
    """The differences in held-out loss, and in right answers where these were measured."""
    compared = pairs(every)
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
