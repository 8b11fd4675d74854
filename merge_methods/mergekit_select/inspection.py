"""Inspects a merge before it is run: what the sub-models changed, and what would be selected from where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import TensorGroup
from mergekit.options import MergeOptions

from mergekit_select.errors import MergekitSelectError
from mergekit_select.replay import PlannedTensor, Replay, ReplayError, replayed
from mergekit_select.selection import Drawn, drawn
from mergekit_select.selection.slots import slots
from mergekit_select.tally import Tally, count, empty

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SELECTION = "parameter_selection"
_RESAMPLING = "parameter_selection_resampling"


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
    config: MergeConfiguration,
    *,
    options: MergeOptions | None = None,
    progress: Progress = lambda tensors: tensors,
) -> Inspection:
    """Go through the models of a recipe once, a tensor at a time, and count.

    The draws are those of the merge: same seed, names, weights after filters and gradients, aligned inputs.

    Args:
        config: The recipe; not modified. Of another method than this package's, only the models are compared.
        options: As for the merge.
        progress: Wraps the tensors as they are gone through.

    Raises:
        UnreadableError: A model cannot be read.
        ReplayError: mergekit refuses the merge.
        MergekitSelectError: A parameter breaks its rule.
    """
    with replayed(config, options) as replay:
        models, bases = _models(replay.tensors)
        tallies = {}
        for planned in progress(replay.tensors):
            tally = _inspect(replay, planned, models)
            if tally is not None:
                tallies[planned.name] = TensorTally(planned.name, *place(planned.name), tally)
        settings = dict(replay.tensors[0].task.parameters.items()) if replay.tensors else {}
    draws = config.merge_method in (_SELECTION, _RESAMPLING)
    rounds = settings.get("rounds")
    return Inspection(
        method=config.merge_method,
        models=tuple(map(str, models)),
        bases=tuple(map(str, bases)),
        draws=draws,
        resamples=config.merge_method == _RESAMPLING,
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
            (bases if model == planned.task.base_model else models)[model] = None
    return [*models], [*bases]


def _inspect(replay: Replay, planned: PlannedTensor, models: list[ModelReference]) -> Tally | None:
    task = planned.task
    group = replay.inputs(planned)
    if not group.entries:
        return None
    base = None if group.base is None else group.base.tensor
    # The replay identifies inputs by model; mergekit's type allows anything hashable.
    by_model = {cast(ModelReference, entry.id): entry.tensor for entry in group.non_base}
    order = [*by_model]
    # The report's order is the first slice's; a slice may list its sub-models in another one.
    listed = sorted(order, key=models.index)
    draws, probabilities = None, []
    if task.method_name in (_SELECTION, _RESAMPLING) and _is_drawn(planned, group):
        weights = [task.input_parameters[model]["weight"] for model in order]
        settings = dict(task.parameters.items())
        rounds = settings.get("rounds")
        try:
            counts = slots(weights)
            draws = drawn(
                [by_model[model] for model in order],
                base if task.method_name == _RESAMPLING else None,
                weights=weights,
                rounds=None if rounds is None else int(rounds),
                seed=int(settings["seed"]),
                name=planned.name,
            )
        except MergekitSelectError as error:
            raise type(error)(f"tensor {planned.name!r}: {error}") from error
        probabilities = [counts[order.index(model)] / sum(counts) for model in listed]
        draws = _relisted(draws, [listed.index(model) for model in order])
    if base is None and not order:
        raise ReplayError(f"tensor {planned.name!r}: no model has it")
    expected = sum(model != task.base_model for model in task.model_order)
    return count(
        [by_model.get(model) for model in models],
        base,
        expected=expected,
        draws=draws,
        probabilities=probabilities,
    )


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
