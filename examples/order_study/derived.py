"""The controls that are merges of merges, or chosen by measuring: made once all other merges are there."""

from collections.abc import Sequence

from examples.order_study.errors import StudyError
from examples.order_study.measure.measure import Measurer
from examples.order_study.merge.merges import make_merges
from examples.order_study.model import SOUP_CANDIDATE, Model
from examples.order_study.settings import SHRUNK, SOUP, STRETCHED


def derive(measurer: Measurer) -> tuple[list[Model], list[Model]]:
    """Have the derived controls of a study in its folder, where its other models are.

    Returns:
        The controls, and the merges that were made to choose one.

    Raises:
        StudyError: A model cannot be merged or measured, or lies where the base does.
    """
    study = measurer.study
    models: list[Model] = []
    candidates: list[Model] = []
    if SOUP in study.controls:
        members, candidates = _greedy_soup(measurer)
        measurer.report(f"{measurer.root}: the greedy soup is of {', '.join(f'order-{order}' for order in members)}")
        models.append(Model("control", control=SOUP, members=members))
    if STRETCHED in study.controls or SHRUNK in study.controls:
        average, selection = measurer.distances([Model("average"), Model("selection", study.merging.seeds[0])])
        if not average or not selection:
            raise StudyError(
                f"{STRETCHED} and {SHRUNK} compare distances from the base, but the average or the selection is the "
                "base: leave these controls out, or train with a higher learning rate"
            )
        factors = {STRETCHED: selection / average, SHRUNK: average / selection}
        # Six digits are what a recipe shows, and more than the distances of weights in bf16 have.
        models += [
            Model("control", control=name, factor=round(factor, 6))
            for name, factor in factors.items()
            if name in study.controls
        ]
    _make(measurer, models)
    return models, candidates


def _greedy_soup(measurer: Measurer) -> tuple[tuple[int, ...], list[Model]]:
    """The order seeds of a greedy soup, and the merges that were tried (Wortsman et al. 2022, recipe 1).

    From the sub-model of the lowest loss on the samples for validation on, each next one joins the average if the
    average with it has no higher loss.
    """
    orders = measurer.study.orders
    losses = measurer.validation_losses([Model("sub-model", order) for order in orders])
    (best, first), *others = sorted(zip(losses, orders, strict=True))
    members: tuple[int, ...] = (first,)
    tried: list[Model] = []
    for _, order in others:
        candidate = Model("control", control=SOUP_CANDIDATE, members=(*members, order))
        _make(measurer, [candidate])
        (loss,) = measurer.validation_losses([candidate])
        tried.append(candidate)
        if loss <= best:
            members, best = candidate.members, loss
    return members, tried


def _make(measurer: Measurer, models: Sequence[Model]) -> None:
    make_merges(measurer.study, measurer.root, models, measurer.report, measurer.jobs)
