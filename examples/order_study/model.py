"""A model of a study: which there are, what each is made of, and where it lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from examples.order_study.settings import LONGER, Study
from examples.order_study.store.places import MERGES, MODELS, RECIPES, STEPS

Kind = Literal["base", "sub-model", "average", "selection", "resampling", "control"]


@dataclass(frozen=True)
class Model:
    """One model, trained or merged, finished or as it was after a step."""

    kind: Kind
    seed: int | None = None  # order seed of a sub-model, merge seed of selection and resampling
    rounds: int | None = None  # of resampling; None: until it differs
    step: int | None = None  # None: finished
    control: str | None = None  # which one, as the settings call it

    @property
    def name(self) -> str:
        """Its own name, that of its folder."""
        if self.control is not None:
            return self.control
        if self.kind == "sub-model":
            return f"order-{self.seed}"
        if self.seed is None or self.step is not None:
            return self.kind
        rounds = "" if self.rounds is None else f"-{self.rounds}"
        return f"{self.kind}{rounds}-seed-{self.seed}"

    @property
    def is_merged(self) -> bool:
        """Whether mergekit makes it; others are trained, or given."""
        return self.kind not in ("base", "sub-model") and self.control != LONGER

    @property
    def place(self) -> str:
        """Its folder, as seen from those of all that were trained or merged."""
        return self.name if self.step is None else f"{STEPS}/{self.step:06}/{self.name}"

    @property
    def folder(self) -> str:
        """Its folder, as seen from the study's."""
        return f"{MERGES if self.is_merged else MODELS}/{self.place}"

    @property
    def recipe(self) -> str:
        """The file of the recipe of a merge, as seen from the study's folder."""
        return f"{RECIPES}/{self.place.replace('/', '-')}.yml"

    @property
    def label(self) -> str:
        """What rows and curves call models that are made like this one, whatever their seed."""
        if self.kind == "resampling":
            times = "until it differs" if self.rounds is None else f"{self.rounds} round{'s' * (self.rounds != 1)}"
            return f"resampling, {times}"
        return self.control or self.kind


def trained(study: Study, steps: Sequence[int] = ()) -> list[Model]:
    """The base, the sub-models, and their states after `steps`."""
    models = [Model("base"), *(Model("sub-model", seed) for seed in study.orders)]
    models += [Model("sub-model", seed, step=step) for step in steps for seed in study.orders]
    return models + [Model("control", control=LONGER)] * (LONGER in study.controls)


def merged(study: Study, steps: Sequence[int] = ()) -> list[Model]:
    """All merges; of the states after `steps` one of each kind, with the first of the merge seeds."""
    if len(study.orders) < 2:
        return []
    seeds, rounds = study.merging.seeds, study.merging.rounds
    models = [Model("average"), *(Model("selection", seed) for seed in seeds)]
    models += [Model("resampling", seed, number) for number in rounds for seed in seeds]
    for step in steps:
        models += [Model("average", step=step), Model("selection", seeds[0], step=step)]
        if rounds:
            models.append(Model("resampling", seeds[0], None if None in rounds else rounds[-1], step))
    return models + [Model("control", control=control) for control in study.controls if control != LONGER]


def inputs(model: Model, study: Study) -> list[Model]:
    """The models that a merge reads: the sub-models, then the base, unless it is the average."""
    subs = [Model("sub-model", order, step=model.step) for order in study.orders]
    return subs if model.kind == "average" else [*subs, Model("base")]
