"""Go through the models of a recipe once, a tensor at a time, and count."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import TensorGroup
from mergekit.options import MergeOptions

from mergekit_select.errors import MergekitSelectError, PlanError
from mergekit_select.inputs.recipe import read_recipe
from mergekit_select.inspection.count import count
from mergekit_select.inspection.tally import Tally, empty
from mergekit_select.methods import OWN, RESAMPLING
from mergekit_select.planner.engine import Engine
from mergekit_select.planner.opening import opened, with_adapter_cache
from mergekit_select.planner.plan import PlannedTensor
from mergekit_select.selection import Drawn, drawn
from mergekit_select.selection.slots import slots

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorTally:
    """What was counted of one tensor.

    Attributes:
        name: The output tensor's name.
        layer: The layer it belongs to; None outside the layers.
        module: Its kind, such as ``self_attn.q_proj``: the name without layer and ``.weight``.
        tally: The counts.
    """

    name: str
    layer: str | None
    module: str
    tally: Tally


@dataclass(frozen=True)
class Inspection:
    """What a merge would do.

    Attributes:
        method: The recipe's merge method.
        models: The sub-models in recipe order.
        bases: The base models: one, none, or several where slices name their own.
        draws: Whether the method draws, so that the tallies say from where.
        resamples: Whether it draws again where the value equals the base's.
        seed: The draws' seed; None if the method does not draw.
        rounds: The most redraws; None for until the value differs.
        tensors: The counts, by layer, those outside the layers last.
    """

    method: str
    models: tuple[str, ...]
    bases: tuple[str, ...]
    draws: bool
    resamples: bool
    seed: int | None
    rounds: int | None
    tensors: tuple[TensorTally, ...]

    @property
    def total(self) -> Tally:
        """The counts of all tensors together."""
        return self._sum(self.tensors)

    @property
    def layers(self) -> dict[str | None, Tally]:
        """The counts by layer, None for all that is outside the layers, which comes last."""
        return self._by(lambda tensor: tensor.layer)

    @property
    def modules(self) -> dict[str, Tally]:
        """The counts by kind of module."""
        return self._by(lambda tensor: tensor.module)

    @property
    def cells(self) -> dict[tuple[str | None, str], Tally]:
        """The counts by layer and kind of module."""
        return self._by(lambda tensor: (tensor.layer, tensor.module))

    def _by(self, key: Callable[[TensorTally], Any]) -> dict[Any, Tally]:
        groups: dict[Any, list[TensorTally]] = {}
        for tensor in self.tensors:
            groups.setdefault(key(tensor), []).append(tensor)
        if None in groups:
            groups[None] = groups.pop(None)
        return {name: self._sum(members) for name, members in groups.items()}

    def _sum(self, tensors: Iterable[TensorTally]) -> Tally:
        return sum((tensor.tally for tensor in tensors), empty(len(self.models)))


Progress = Callable[[Iterable[PlannedTensor]], Iterable[PlannedTensor]]


def inspect(
    recipe: MergeConfiguration | str | Path,
    *,
    options: MergeOptions | None = None,
    progress: Progress = lambda tensors: tensors,
) -> Inspection:
    """Say what a recipe would select from where, and what its sub-models changed.

    The draws are those of the merge: same seed, names, weights after filters and gradients, aligned inputs.

    Args:
        recipe: The recipe, or its file; not modified. Of another method than this package's, only the models are
            compared.
        options: As for the merge.
        progress: Wraps the tensors as they are gone through.

    Raises:
        UnreadableError: The recipe or a model cannot be read.
        PlanError: mergekit refuses the merge.
        MergekitSelectError: A parameter breaks its rule.
    """
    config = recipe if isinstance(recipe, MergeConfiguration) else read_recipe(recipe)
    with with_adapter_cache(options) as complete, opened(config, complete) as engine:
        models, bases = _models(engine.tensors)
        tallies = {}
        for planned in progress(engine.tensors):
            tally = _inspect(engine, planned, models)
            if tally is not None:
                tallies[planned.name] = TensorTally(planned.name, *place(planned.name), tally)
        settings = engine.tensors[0].shared if engine.tensors else {}
    draws = config.merge_method in OWN
    rounds = settings.get("rounds")
    return Inspection(
        method=config.merge_method,
        models=tuple(map(str, models)),
        bases=tuple(map(str, bases)),
        draws=draws,
        resamples=config.merge_method == RESAMPLING,
        seed=int(settings["seed"]) if draws and settings else None,
        rounds=None if rounds is None or not draws else int(rounds),
        tensors=tuple(sorted(tallies.values(), key=lambda t: (t.layer is None, _natural(t.name)))),
    )


def place(name: str) -> tuple[str | None, str]:
    """Return a tensor's layer, None if it is in none, and its kind of module.

    The layer is told by the first number in the name, as mergekit does. Further numbers, such as those of experts,
    are left out of the kind.
    """
    match = _LAYER.search(name)
    rest = name[match.end() :] if match else name
    parts = _NUMBER.sub("*", f".{rest}.").strip(".").split(".")
    if parts[-1] == "weight" and len(parts) > 1:
        parts.pop()
    if match is None and len(parts) > 1:
        parts.pop(0)  # the whole model's own name, as in model.norm
    return (name[: match.end() - 1] if match else None), ".".join(parts)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _models(tensors: Iterable[PlannedTensor]) -> tuple[list[ModelReference], list[ModelReference]]:
    models: dict[ModelReference, None] = {}
    bases: dict[ModelReference, None] = {}
    for planned in tensors:
        for model in planned.task.model_order:
            (bases if model == planned.base else models)[model] = None
    return [*models], [*bases]


def _inspect(engine: Engine, planned: PlannedTensor, models: list[ModelReference]) -> Tally | None:
    group = engine.inputs(planned)
    if not group.entries:
        return None
    base = None if group.base is None else group.base.tensor
    # The engine identifies inputs by model; mergekit's type allows anything hashable.
    by_model = {cast(ModelReference, entry.id): entry.tensor for entry in group.non_base}
    if base is None and not by_model:
        raise PlanError(f"tensor {planned.name!r}: no model has it")
    order = [*by_model]
    # The report's order is the first slice's; a slice may list its sub-models in another one.
    listed = sorted(order, key=models.index)
    draws, probabilities = None, list[float]()
    if planned.task.method_name in OWN and _is_drawn(planned, group):
        draws, shares = _draws(planned, group, order)
        probabilities = [shares[order.index(model)] for model in listed]
        draws = _relisted(draws, [listed.index(model) for model in order])
    expected = sum(model != planned.base for model in planned.task.model_order)
    return count(
        [by_model.get(model) for model in models],
        base,
        expected=expected,
        draws=draws,
        probabilities=probabilities,
    )


def _draws(
    planned: PlannedTensor, group: TensorGroup, order: list[ModelReference]
) -> tuple[Iterator[Drawn], list[float]]:
    """Return where the merge takes each element from, and the probability of each sub-model's first draw."""
    weights = [planned.per_input[model]["weight"] for model in order]
    rounds = planned.shared.get("rounds")
    resamples = planned.task.method_name == RESAMPLING and group.base is not None
    try:
        counts = slots(weights)
        draws = drawn(
            [entry.tensor for entry in group.non_base],
            group.base.tensor if resamples and group.base is not None else None,
            weights=weights,
            rounds=None if rounds is None else int(rounds),
            seed=int(planned.shared["seed"]),
            name=planned.name,
        )
    except MergekitSelectError as error:
        raise type(error)(f"tensor {planned.name!r}: {error}") from error
    return draws, [slot / sum(counts) for slot in counts]


def _is_drawn(planned: PlannedTensor, group: TensorGroup) -> bool:
    """Whether mergekit hands the tensor to the method, and does not copy it itself."""
    if planned.weight.optional and len(group.entries) == 1 < len(planned.task.model_order):
        return False
    return all(tensor.is_floating_point() for tensor in group.tensors)


def _relisted(draws: Iterator[Drawn], positions: list[int]) -> Iterator[Drawn]:
    """Pass on draws with other positions; what is left at the base stays -1."""
    if positions == [*range(len(positions))]:
        yield from draws
        return
    for part in draws:
        table = torch.tensor([*positions, -1], dtype=torch.int16, device=part.first.device)
        yield Drawn(part.start, table[part.first.long()], table[part.chosen.long()])
