"""The controls that are merges of merges, or chosen by measuring: made once all other merges are there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.order_study.measure.measure import distances, validation_losses
from examples.order_study.merge.merges import make_merges
from examples.order_study.model import SOUP_CANDIDATE, Model
from examples.order_study.settings import SHRUNK, SOUP, STRETCHED, Study
from examples.order_study.train.models import Trained

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Deriving:
    """What making and measuring models takes."""

    study: Study
    root: Path
    trained: Trained
    report: Report
    jobs: int
    ray: str | None

    def make(self, models: Sequence[Model]) -> None:
        make_merges(self.study, self.root, models, self.report, self.jobs)

    def losses(self, models: Sequence[Model]) -> list[float]:
        return validation_losses(self.study, self.root, models, self.trained, self.report, self.jobs, self.ray)

    def distances(self, models: Sequence[Model]) -> list[float]:
        return distances(self.study, self.root, models, self.trained, self.report, self.jobs, self.ray)


def derive(
    study: Study, root: Path, trained: Trained, report: Report, jobs: int = 1, ray: str | None = None
) -> tuple[list[Model], list[Model]]:
    """Have the derived controls of a study in `root`, whose other models are there.

    Returns:
        The controls, and the merges that were made to choose one.

    Raises:
        StudyError: A model cannot be merged or measured.
    """
    deriving = _Deriving(study, root, trained, report, jobs, ray)
    models: list[Model] = []
    candidates: list[Model] = []
    if SOUP in study.controls:
        members, candidates = _greedy_soup(deriving)
        report(f"{root}: the greedy soup is of {', '.join(f'order-{order}' for order in members)}")
        models.append(Model("control", control=SOUP, members=members))
    if STRETCHED in study.controls or SHRUNK in study.controls:
        average, selection = deriving.distances([Model("average"), Model("selection", study.merging.seeds[0])])
        factors = {STRETCHED: selection / average, SHRUNK: average / selection}
        # Six digits are what a recipe shows, and more than the distances of weights in bf16 have.
        models += [
            Model("control", control=name, factor=round(factor, 6))
            for name, factor in factors.items()
            if name in study.controls
        ]
    deriving.make(models)
    return models, candidates


def _greedy_soup(deriving: _Deriving) -> tuple[tuple[int, ...], list[Model]]:
    """The order seeds of a greedy soup, and the merges that were tried (Wortsman et al. 2022, recipe 1).

    From the sub-model of the lowest loss on the samples for validation on, each next one joins the average if the
    average with it has no higher loss.
    """
    orders = deriving.study.orders
    losses = deriving.losses([Model("sub-model", order) for order in orders])
    (best, first), *others = sorted(zip(losses, orders, strict=True))
    members: tuple[int, ...] = (first,)
    tried: list[Model] = []
    for _, order in others:
        candidate = Model("control", control=SOUP_CANDIDATE, members=(*members, order))
        deriving.make([candidate])
        (loss,) = deriving.losses([candidate])
        tried.append(candidate)
        if loss <= best:
            members, best = candidate.members, loss
    return members, tried
