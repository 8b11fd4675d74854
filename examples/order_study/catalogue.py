"""Which models a study has, and where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from order_study.measurements import ModelKind
from order_study.recipes import MODELS, STEPS, Merge
from order_study.settings import BASE, Study


@dataclass(frozen=True)
class Model:
    """One model of a study; its folder is given as seen from the study's."""

    folder: str
    kind: ModelKind
    seed: int | None = None  # order seed of a sub-model, merge seed of a merge
    rounds: int | None = None  # of resampling; None: until it differs
    step: int | None = None  # None: finished

    @property
    def name(self) -> str:
        """The name of its folder."""
        return PurePosixPath(self.folder).name

    @property
    def place(self) -> str:
        """Its folder without the first part, which tells models that were trained from those that were merged."""
        return self.folder.partition("/")[2]


def models_of(study: Study, steps: Sequence[int], merges: Sequence[Merge]) -> list[Model]:
    """All models of a study: the base, the sub-models and their states after `steps`, the merges of both."""
    models = [Model(f"{MODELS}/{BASE}", "base")]
    models += [Model(f"{MODELS}/order-{seed}", "sub-model", seed) for seed in study.orders]
    models += [
        Model(f"{MODELS}/{STEPS}/{step:06}/order-{seed}", "sub-model", seed, step=step)
        for step in steps
        for seed in study.orders
    ]
    return models + [Model(merge.folder, merge.kind, merge.seed, merge.rounds, merge.step) for merge in merges]
