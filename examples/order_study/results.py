"""The results of a study: all numbers that tables and figures show, and the settings they come from."""

import math
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from order_study.comparisons import Difference, Row, differences, groups, resampling_label, row
from order_study.errors import StudyError
from order_study.imbalance import Anchor, Trend, anchor, trends
from order_study.measurements import Measured, Measurements, ModelKind, PartCount
from order_study.settings import Study

SCHEMA: Literal[1] = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelResult(_Frozen):
    """One model, final or intermediate."""

    name: str
    kind: ModelKind
    seed: int | None
    rounds: int | None
    step: int | None  # None: final
    loss: float  # held-out, in nats per token
    perplexity: float
    training_loss: float | None  # on the fine-tuning samples that were measured, in nats per token
    exact_match: float | None
    equal_to_base: float | None


class StepPoint(_Frozen):
    """Held-out loss after some optimiser steps."""

    step: int
    loss: float  # the mean over the models
    least: float
    greatest: float


class StepCurve(_Frozen):
    """Held-out loss along the training: of the sub-models, or of a merge of their states at each step."""

    label: str
    kind: ModelKind
    points: tuple[StepPoint, ...]


class Results(_Frozen):
    """The contents of results.json."""

    schema_version: Literal[1] = SCHEMA
    study: Study
    counts: dict[str, PartCount]
    steps: int  # optimiser steps in the training of one sub-model
    batches: int  # in an epoch
    held_out_samples: int
    held_out_tokens: int
    exact_match_samples: int | None
    training_samples: int | None  # that were measured
    models: tuple[ModelResult, ...]
    table: tuple[Row, ...]
    differences: tuple[Difference, ...]
    trends: tuple[Trend, ...]
    anchor: Anchor | None
    along_steps: tuple[StepCurve, ...]


def build(measurements: Measurements) -> Results:
    """Work out all results; the same measurements give the same ones.

    Raises:
        StudyError: The measurements do not belong together.
    """
    _check(measurements)
    every = groups(measurements)
    first = measurements.final("sub-model")[0]
    return Results(
        study=measurements.study,
        counts=dict(measurements.counts),
        steps=measurements.steps,
        batches=measurements.positions[0].batches,
        held_out_samples=len(first.held_out.tokens),
        held_out_tokens=int(first.held_out.tokens.sum()),
        exact_match_samples=None if first.exact is None else len(first.exact),
        training_samples=None if first.training is None else len(first.training.tokens),
        models=tuple(_model(model) for model in measurements.models),
        table=tuple(row(group) for group in every),
        differences=tuple(differences(every, measurements.study.measuring)),
        trends=trends(measurements),
        anchor=anchor(measurements),
        along_steps=_along_steps(measurements),
    )


def save(results: Results, path: Path) -> None:
    """Write results.json."""
    path.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Results:
    """Read results.json.

    Raises:
        StudyError: It is not there, or of another version.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise StudyError(
            f"results are read from a file of schema version {SCHEMA}, but {path} is none ({reason}): "
            "run the study again"
        ) from error


def _check(measurements: Measurements) -> None:
    names = tuple(f"order-{order}" for order in measurements.study.orders)
    singles = measurements.final("sub-model")
    if not names == tuple(model.name for model in singles) == tuple(where.order for where in measurements.positions):
        raise StudyError(
            f"a study needs the final sub-model and the positions of each of its orders, {', '.join(names)}, got "
            f"models {', '.join(model.name for model in singles) or 'none'} and positions of "
            f"{', '.join(where.order for where in measurements.positions) or 'none'}: measure them again"
        )
    first = singles[0]
    for model in measurements.models:
        for part, mine, theirs in (
            ("held-out", model.held_out, first.held_out),
            ("fine-tuning", model.training, first.training),
        ):
            if mine is not None and theirs is not None and not np.array_equal(mine.tokens, theirs.tokens):
                raise StudyError(
                    f"models are compared on the same tokens only, but {model.name} has other {part} samples than "
                    f"{first.name}: measure both again"
                )
        if model.exact is not None and first.exact is not None and len(model.exact) != len(first.exact):
            raise StudyError(
                f"models are compared on the same answers only, but {model.name} gave {len(model.exact)} and "
                f"{first.name} {len(first.exact)}: measure both again"
            )
    for where in measurements.positions:
        if first.training is not None and not len(where.first) == len(where.last) == len(first.training.tokens):
            raise StudyError(
                f"each fine-tuning sample that is measured has a position, but {where.order} gives {len(where.first)} "
                f"in the first and {len(where.last)} in the last epoch for {len(first.training.tokens)} samples: "
                "measure them again"
            )


def _model(model: Measured) -> ModelResult:
    loss = model.held_out.mean()
    return ModelResult(
        name=model.name,
        kind=model.kind,
        seed=model.seed,
        rounds=model.rounds,
        step=model.step,
        loss=loss,
        perplexity=math.exp(loss),
        training_loss=None if model.training is None else model.training.mean(),
        exact_match=None if model.exact is None else float(model.exact.mean()),
        equal_to_base=model.equal_to_base,
    )


def _along_steps(measurements: Measurements) -> tuple[StepCurve, ...]:
    """The curves of those models that were measured at intermediate states, each with its final state."""
    states = [model for model in measurements.models if model.step is not None and model.kind != "base"]
    curves = []
    for kind, rounds in dict.fromkeys((model.kind, model.rounds) for model in states):
        # Of merges, only the seeds that were merged along the way: the last point must not have others than the rest.
        seeds = {model.seed for model in states if (model.kind, model.rounds) == (kind, rounds)}
        losses: dict[int, list[float]] = {}
        for model in measurements.models:
            if (model.kind, model.rounds) == (kind, rounds) and model.seed in seeds:
                step = measurements.steps if model.step is None else model.step
                losses.setdefault(step, []).append(model.held_out.mean())
        points = tuple(
            StepPoint(step=step, loss=float(np.mean(some)), least=min(some), greatest=max(some))
            for step, some in sorted(losses.items())
        )
        label = resampling_label(rounds) if kind == "resampling" else "sub-models" if kind == "sub-model" else kind
        curves.append(StepCurve(label=label, kind=kind, points=points))
    return tuple(curves)
