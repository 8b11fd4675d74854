"""A model of a study: which there are, what each is made of, and where it lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from examples.order_study.data.records import expand
from examples.order_study.settings import (
    DERIVED_CONTROLS,
    ENSEMBLE,
    LONGER,
    MORE_STEPS,
    SAME_ORDER,
    SAME_ORDER_AVERAGE,
    SHRUNK,
    SOUP,
    TRAINED_CONTROLS,
    Study,
)
from examples.order_study.store.places import MERGES, MODELS, RECIPES, STEPS

SOUP_CANDIDATE = "soup-of"  # a merge that is made to see whether the soup takes one more sub-model

Kind = Literal["base", "sub-model", "average", "selection", "resampling", "control"]


@dataclass(frozen=True)
class Model:
    """One model, trained or merged, finished or as it was after a step."""

    kind: Kind
    seed: int | None = None  # order seed of a sub-model, merge seed of selection and resampling, training seed else
    rounds: int | None = None  # of resampling; None: until it differs
    step: int | None = None  # None: finished
    control: str | None = None  # which one, as the settings call it
    members: tuple[int, ...] = ()  # order seeds of the sub-models in a soup
    factor: float | None = None  # of a step from the base, where it was worked out from other merges
    elsewhere: str | None = None  # the folder of a model that this study has not made

    @property
    def name(self) -> str:
        """Its own name, that of its folder."""
        if self.control is not None:
            if self.control == SOUP_CANDIDATE:
                return "-".join([self.control, *map(str, self.members)])
            return self.control if self.seed is None else f"{self.control}-{self.seed}"
        if self.kind == "sub-model":
            return f"order-{self.seed}"
        if self.seed is None or self.step is not None:
            return self.kind
        rounds = "" if self.rounds is None else f"-{self.rounds}"
        return f"{self.kind}{rounds}-seed-{self.seed}"

    @property
    def is_merged(self) -> bool:
        """Whether mergekit makes it; others are trained, or given."""
        return self.kind not in ("base", "sub-model") and self.control not in (*TRAINED_CONTROLS, ENSEMBLE)

    @property
    def place(self) -> str:
        """Its folder, as seen from those of all that were trained or merged."""
        return self.name if self.step is None else f"{STEPS}/{self.step:06}/{self.name}"

    @property
    def folder(self) -> str:
        """Its folder, as seen from the study's."""
        if self.elsewhere is not None:
            return self.elsewhere
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
    models += [Model("control", control=name) for name in (LONGER, MORE_STEPS) if name in study.controls]
    if SAME_ORDER in study.controls:
        models += [Model("control", seed, control=SAME_ORDER) for seed in study.same_order_seeds()]
    return models


def merged(study: Study, steps: Sequence[int] = ()) -> list[Model]:
    """All merges that need nothing but trained models.

    Of the states after `steps` there is one of each kind, with the first of the merge seeds.
    """
    if len(study.orders) < 2:
        return []
    seeds, rounds = study.merging.seeds, study.merging.rounds
    models = [Model("average"), *(Model("selection", seed) for seed in seeds)]
    models += [Model("resampling", seed, number) for number in rounds for seed in seeds]
    for step in steps:
        models += [Model("average", step=step), Model("selection", seeds[0], step=step)]
        if rounds:
            models.append(Model("resampling", seeds[0], None if None in rounds else rounds[-1], step))
    apart = (*TRAINED_CONTROLS, *DERIVED_CONTROLS, ENSEMBLE)
    models += [Model("control", control=control) for control in study.controls if control not in apart]
    return models + [Model("control", control=SAME_ORDER_AVERAGE)] * (SAME_ORDER in study.controls)


def inputs(model: Model, study: Study) -> list[Model]:
    """The models that a merge reads: those that it merges, then the base, unless it is an average."""
    base = Model("base")
    subs = [Model("sub-model", order, step=model.step) for order in study.orders]
    if model.kind == "average":
        return subs
    if model.control in (SOUP, SOUP_CANDIDATE):
        return [Model("sub-model", order) for order in model.members]
    if model.control == SAME_ORDER_AVERAGE:
        return [Model("control", seed, control=SAME_ORDER) for seed in study.same_order_seeds()]
    if model.control == SHRUNK:
        return [Model("selection", study.merging.seeds[0]), base]
    return [*subs, base]


def read_from(model: Model, study: Study) -> list[Model]:
    """The models whose folders are read to measure one: itself, or those of an ensemble."""
    return [Model("sub-model", order) for order in study.orders] if model.control == ENSEMBLE else [model]


def others(study: Study) -> list[Model]:
    """The models from elsewhere that are measured too."""
    return [
        Model("control", control=name, elsewhere=str(expand(folder).absolute()))
        for name, folder in study.others.items()
    ]


def drawn(study: Study) -> list[Model]:
    """The merges whose losses on the fine-tuning samples a figure shows: the average, and one each of the others."""
    seed, rounds = study.merging.seeds[0], study.merging.rounds
    models = [Model("average"), Model("selection", seed)]
    if rounds:  # the one that resamples most; the others lie between it and selection
        most = None if None in rounds else max(number for number in rounds if number is not None)
        models.append(Model("resampling", seed, most))
    return models
