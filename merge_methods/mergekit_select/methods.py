"""The two merge methods: their contract and parameters, and the step from mergekit's tensors to ``selection``.

Importing this module makes both known to mergekit by name, for where the startup file has not done so.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Annotated, Any, NoReturn

import torch
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    OptionalTensorPolicy,
    PerInputValues,
    PerNonBase,
    TensorGroup,
    merge_method,
)
from pydantic import PlainValidator

from mergekit_select import _plugins, _startup, selection
from mergekit_select.errors import MergekitSelectError, ParameterError, TensorError
from mergekit_select.selection import draws

_PAPER = "https://arxiv.org/abs/2410.03743"

SELECTION = "parameter_selection"
RESAMPLING = "parameter_selection_resampling"
OWN = (SELECTION, RESAMPLING)


class _Whole(int):
    """An integer parameter that refuses to be interpolated.

    mergekit takes a flat list for a gradient and interpolates between its validated values. The result is a float,
    which is refused as such, save where no layers are involved: there ``seed: [2, 2]`` would become the integer 2.
    """

    parameter: str

    def _refuse(self, _other: object) -> NoReturn:
        raise ParameterError(
            f"{self.parameter} must be one integer for the whole merge, got a list (mergekit would interpolate it); "
            f"write {self.parameter}: {int(self)}"
        )

    __mul__ = __rmul__ = _refuse


def _whole(parameter: str, value: object, rule: str, fits: bool) -> int:
    # A boolean is an int to Python; nobody means one here.
    if isinstance(value, bool) or not isinstance(value, int) or not fits:
        hint = " (mergekit makes such a number of a list)" if isinstance(value, float) else ""
        raise ParameterError(f"{parameter} must be {rule}, got {value!r}{hint}")
    result = _Whole(value)
    result.parameter = parameter
    return result


def _weight(value: object) -> float:
    remedy = "give a number of at least 0, such as weight: 1"
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise ParameterError(f"weight must be a finite number of at least 0, got {value!r}; {remedy}") from None
    if not (math.isfinite(number) and number >= 0):
        raise ParameterError(f"weight must be a finite number of at least 0, got {value!r}; {remedy}")
    return number


def _seed(value: object) -> int:
    fits = isinstance(value, int) and 0 <= value < draws.SEED_LIMIT
    return _whole("seed", value, "an integer in [0, 2^63), such as seed: 0", fits)


def _rounds(value: object) -> int | None:
    if value is None:
        return None
    fits = isinstance(value, int) and value >= 1
    return _whole("rounds", value, "an integer of at least 1, or left out to redraw until the value differs", fits)


def _draws(value: object) -> int:
    rule = f"{draws.VERSION}, the only version of the draws that this mergekit-select knows; upgrade it for a later one"
    return _whole("draws", value, rule, value == draws.VERSION)


Weight = Annotated[float, PlainValidator(_weight)]
Seed = Annotated[int, PlainValidator(_seed)]
Rounds = Annotated[int | None, PlainValidator(_rounds)]
Draws = Annotated[int, PlainValidator(_draws)]


class _KeepingTies(GroupMergeMethod):
    """A method whose merges in memory keep tied tensors tied: the draws of the first name hold for all, as on disk.

    mergekit calls a method with all tensors of a merge in memory at once. Its merges on disk take another way, where
    the architecture tells what is tied.
    """

    def __init__(self, method: GroupMergeMethod) -> None:
        self.spec = method.spec
        self._method = method

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        return self._method.merge_group(group, **parameters)

    def __call__(self, groups: Sequence[TensorGroup], /, **options: Any) -> tuple[torch.Tensor, ...]:
        groups = tuple(groups)
        merged = super().__call__(groups, **options)
        first: dict[Hashable, int] = {}
        return tuple(merged[first.setdefault(_memory(group), index)] for index, group in enumerate(groups))


def _memory(group: TensorGroup) -> Hashable:
    """Where the tensors of a group lie: the same for two names exactly if these are tied in every model."""
    return tuple(
        (
            entry.id,
            entry.tensor.device,
            entry.tensor.data_ptr(),
            entry.tensor.dtype,
            entry.tensor.shape,
            entry.tensor.stride(),
        )
        for entry in group.entries
    )


@_KeepingTies
@merge_method(
    name=SELECTION,
    pretty_name="Parameter Selection",
    reference_url=_PAPER,
    contract=InputContract(base=BasePolicy.OPTIONAL, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
)
def parameter_selection(
    group: TensorGroup,
    weight: PerNonBase[Weight] = 1.0,  # type: ignore[assignment]  # mergekit broadcasts a scalar default
    seed: Seed = 0,
    draws: Draws = 1,
) -> torch.Tensor:
    """Copy every parameter whole from one sub-model, drawn at random; see ``selection.select`` and docs/methods.md."""
    return _apply(group, weight, seed)


@_KeepingTies
@merge_method(
    name=RESAMPLING,
    pretty_name="Parameter Selection with Resampling",
    reference_url=_PAPER,
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
)
def parameter_selection_resampling(
    group: TensorGroup,
    weight: PerNonBase[Weight] = 1.0,  # type: ignore[assignment]  # mergekit broadcasts a scalar default
    seed: Seed = 0,
    rounds: Rounds = None,
    draws: Draws = 1,
) -> torch.Tensor:
    """Select, and draw again where the value equals the base's; see ``selection.resample`` and docs/methods.md."""
    base = group.base
    assert base is not None  # mergekit has enforced the contract
    return _apply(group, weight, seed, base.tensor, rounds)


def _apply(
    group: TensorGroup,
    weight: PerInputValues[float],
    seed: int,
    base: torch.Tensor | None = None,
    rounds: int | None = None,
) -> torch.Tensor:
    entries = group.non_base
    tensors = [entry.tensor for entry in entries]
    weights = weight.values_for(entries)
    name = group.metadata.name or ""
    try:
        if base is None:
            return selection.select(tensors, weights=weights, seed=int(seed), name=name)
        limit = None if rounds is None else int(rounds)
        return selection.resample(tensors, base, weights=weights, rounds=limit, seed=int(seed), name=name)
    except MergekitSelectError as error:
        # Deeper down nobody knows which tensor this is.
        place = f"tensor {name!r}" if name else "a tensor without a name"
        kind = type(error) if isinstance(error, (ParameterError, TensorError)) else MergekitSelectError
        raise kind(f"{place}, models {', '.join(str(entry.id) for entry in entries)}: {error}") from error


_plugins.register_methods(parameter_selection, parameter_selection_resampling, and_plugins=not _startup.turned_off())
