"""The data of a study as all its models see it, and where in the training each sample was."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from order_study import order
from order_study.measurements import PartCount, Positions
from order_study.parts import read_part
from order_study.samples import TEXT_FOLDER, encoded_part, read_counts
from order_study.settings import BASE, Study
from order_study.tokens import Sample


@dataclass(frozen=True)
class Material:
    """What models are measured with, in the tokens of the base, which are those of all models of a study."""

    base: Path
    context: int  # tokens that the models can see at once
    fine_tuning: list[Sample]
    held_out: list[Sample]
    responses: list[str]  # of the held-out samples
    counts: Mapping[str, PartCount]


def read_material(models: Path) -> Material:
    """Read back the data that the models in a folder were trained on.

    Raises:
        StudyError: It cannot be read.
    """
    counts = read_counts(models)
    left_out = set(counts.left_out["held_out"])
    examples = read_part(models / TEXT_FOLDER, "held_out")
    return Material(
        base=models / BASE,
        context=counts.context,
        fine_tuning=encoded_part(models, "fine_tuning").samples,
        held_out=encoded_part(models, "held_out").samples,
        responses=[example.response for index, example in enumerate(examples) if index not in left_out],
        counts={
            part: PartCount(samples=number, left_out=len(counts.left_out[part]))
            for part, number in counts.samples.items()
        },
    )


def positions(study: Study, seed: int, samples: int) -> Positions:
    """In which batch of the first and of the last epoch each fine-tuning sample that is measured was."""
    training = study.fine_tuning
    places = []
    for epoch in (0, training.epochs - 1):
        batches = order.batches(samples, seed, epoch, training.batch_size, study.composition)
        place = np.empty(samples, dtype=np.int64)
        for index, batch in enumerate(batches):
            place[batch] = index
        places.append(place[: study.measuring.training_samples])
    return Positions(order=f"order-{seed}", first=places[0], last=places[1], batches=len(batches))
