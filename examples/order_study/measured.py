"""What is measured of the models of a study: numbers for each sample, from which tables and figures are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from examples.order_study.errors import StudyError
from examples.order_study.model import Kind, Model
from examples.order_study.settings import Study

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Booleans: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SampleLosses:
    """The loss of one model on each of n samples.

    Attributes:
        total: [n] nats, summed over the response tokens of the sample.
        tokens: [n] how many these are, at least one.
        right: [n] whether greedy decoding gives the response; None where that was not looked at.
    """

    total: Floats
    tokens: Integers
    right: Booleans | None = None

    def per_token(self) -> Floats:
        """[n] mean loss of each sample, in nats per token."""
        return self.total / self.tokens

    def mean(self) -> float:
        """Mean loss over all tokens of all samples, in nats: long samples weigh more."""
        return float(self.total.sum() / self.tokens.sum())


def finite(model: Model, losses: SampleLosses) -> SampleLosses:
    """The losses of a model, as they are.

    Raises:
        StudyError: One is not a number, or infinite.
    """
    if not np.isfinite(losses.total).all():
        raise StudyError(
            f"losses must be finite, but {model.name}, step {model.step or 'final'}, has a loss of "
            f"{losses.total[~np.isfinite(losses.total)][0]}: it diverged; lower its learning rate"
        )
    return losses


@dataclass(frozen=True, eq=False)
class Measured:
    """What is measured of one model.

    Attributes:
        model: Which one.
        held_out: Losses on the held-out part.
        training: Losses on the fine-tuning part (or its first samples), of the final models that a figure shows.
        validation: Losses on the samples for validation, of the final sub-models where there are such samples.
        exact: [n] whether the answer to each held-out sample (or to the first ones) is right.
        equal_to_base: The share of parameters that have the bits of the base's.
        distance: From the base, the Euclidean norm over all parameters.
    """

    model: Model
    held_out: SampleLosses
    training: SampleLosses | None = None
    validation: SampleLosses | None = None
    exact: Booleans | None = None
    equal_to_base: float | None = None
    distance: float | None = None

    def __post_init__(self) -> None:
        for part in (self.held_out, self.training, self.validation):
            if part is not None:
                finite(self.model, part)


@dataclass(frozen=True, eq=False)
class Positions:
    """When each fine-tuning sample was seen in one order.

    Attributes:
        order: Name of the sub-model, such as "order-1".
        seen: [n, epochs] index of the batch, from 0 through the whole training, in which the sample was.
        batches: Batches in each epoch.
        learning_rate: [n] the sum of the learning rates at which the sample was seen, in units of the highest one; None
            where the training ended within its first epoch.
    """

    order: str
    seen: Integers
    batches: int
    learning_rate: Floats | None = None

    @property
    def first(self) -> Integers:
        """[n] index of the batch of the first epoch in which the sample was, from 0."""
        return self.seen[:, 0]

    @property
    def last(self) -> Integers:
        """[n] the same for the last epoch."""
        return self.seen[:, -1] % self.batches


@dataclass(frozen=True)
class PartCount:
    """The samples of one part of the data."""

    samples: int  # those used
    left_out: int  # those left out because longer than the context


@dataclass(frozen=True, eq=False)
class Measurements:
    """All that is measured in one study.

    Attributes:
        study: Its settings.
        models: Base, sub-models and merges, final and intermediate. All have the same held-out samples, and all final
            sub-models and merges the same fine-tuning samples, in the same sequence.
        positions: Of each order, in the sequence of `study.orders`; for the fine-tuning samples that are measured.
        counts: By part of the data: "base", "fine_tuning", "held_out".
        steps: Optimiser steps in the training of one sub-model.
    """

    study: Study
    models: tuple[Measured, ...]
    positions: tuple[Positions, ...]
    counts: Mapping[str, PartCount]
    steps: int

    @property
    def epochs(self) -> int:
        """How many epochs each sub-model was trained through to their end."""
        return self.steps // self.positions[0].batches

    def final(self, kind: Kind) -> tuple[Measured, ...]:
        """The final models of a kind."""
        return tuple(one for one in self.models if one.model.kind == kind and one.model.step is None)
