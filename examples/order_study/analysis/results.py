"""The results of a study: all numbers that tables and figures show, and the settings they come from."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from examples.order_study.analysis.comparisons import Difference, Row, differences, groups
from examples.order_study.analysis.imbalance import Anchor, Cause, Trend, anchor, causes, trends
from examples.order_study.measured import Measured, Measurements, PartCount
from examples.order_study.model import Kind
from examples.order_study.settings import Study
from examples.order_study.sources import Frozen, unset


class StepPoint(Frozen):
    """Held-out loss after some optimiser steps."""

    step: int
    loss: float  # the mean over the models
    least: float
    greatest: float


class StepCurve(Frozen):
    """Held-out loss along the training: of the sub-models, or of a merge of their states at each step."""

    label: str
    kind: Kind
    points: tuple[StepPoint, ...]


class Results(Frozen):
    """The contents of results.json."""

    schema_version: Literal[1] = 1
    study: Study
    counts: dict[str, PartCount]
    steps: int  # optimiser steps in the training of one sub-model
    batches: int  # in an epoch
    held_out_samples: int
    held_out_tokens: int
    exact_match_samples: int | None
    training_samples: int | None  # that were measured
    models: tuple[Mapping[str, Any], ...]  # `_model` has the keys
    table: tuple[Row, ...]
    differences: tuple[Difference, ...]
    trends: tuple[Trend, ...]
    causes: tuple[Cause, ...] = Field(default=(), exclude_if=unset)
    anchor: Anchor | None
    along_steps: tuple[StepCurve, ...]


def build(measurements: Measurements) -> Results:
    """Work out all results; the same measurements give the same ones."""
    every = groups(measurements)
    first = measurements.final("sub-model")[0]
    found = trends(measurements)
    return Results(
        study=measurements.study,
        counts=dict(measurements.counts),
        steps=measurements.steps,
        batches=measurements.positions[0].batches,
        held_out_samples=len(first.held_out.tokens),
        held_out_tokens=int(first.held_out.tokens.sum()),
        exact_match_samples=None if first.exact is None else len(first.exact),
        training_samples=None if first.training is None else len(first.training.tokens),
        models=tuple(_model(one) for one in measurements.models),
        table=tuple(group.row() for group in every),
        differences=tuple(differences(every, measurements.study.measuring)),
        trends=found,
        causes=causes(measurements, found),
        anchor=anchor(measurements),
        along_steps=_along_steps(measurements),
    )


def save(results: Results, path: Path) -> None:
    """Write results.json."""
    path.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _model(one: Measured) -> dict[str, Any]:
    """One model, final or intermediate, as results.json lists it."""
    model, loss = one.model, one.held_out.mean()
    return {
        "name": model.name,
        "kind": model.kind,
        "seed": model.seed,
        "rounds": model.rounds,
        "step": model.step,  # None: final
        "loss": loss,  # held-out, in nats per token
        "perplexity": math.exp(loss),
        "training_loss": None if one.training is None else one.training.mean(),  # on the samples that were measured
        "exact_match": None if one.exact is None else float(one.exact.mean()),
        "equal_to_base": one.equal_to_base,
    }


def _along_steps(measurements: Measurements) -> tuple[StepCurve, ...]:
    """The curves of those models that were measured at intermediate states, each with its final state."""
    states = [one.model for one in measurements.models if one.model.step is not None]
    curves = []
    for kind, label in dict.fromkeys((model.kind, model.label) for model in states):
        # Of merges, only the seeds that were merged along the way: the last point must not have others than the rest.
        seeds = {model.seed for model in states if model.label == label}
        losses: dict[int, list[float]] = {}
        for one in measurements.models:
            if one.model.label == label and one.model.seed in seeds:
                step = measurements.steps if one.model.step is None else one.model.step
                losses.setdefault(step, []).append(one.held_out.mean())
        points = tuple(
            StepPoint(step=step, loss=float(np.mean(some)), least=min(some), greatest=max(some))
            for step, some in sorted(losses.items())
        )
        curves.append(StepCurve(label="sub-models" if kind == "sub-model" else label, kind=kind, points=points))
    return tuple(curves)
