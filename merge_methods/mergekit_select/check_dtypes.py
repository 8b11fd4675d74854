"""Findings about one tensor's dtypes, and the dtype that a merge method will see."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mergekit.common import dtype_from_name

from mergekit_select.findings import GroupedFindings, one_line, some
from mergekit_select.models import Model
from mergekit_select.planning import Planned
from mergekit_select.safetensors_header import Tensor


def merged_dtype(
    planned: Planned,
    entries: Sequence[tuple[Model, Tensor]],
    dtypes: Sequence[torch.dtype],
    problems: GroupedFindings,
) -> torch.dtype | None:
    """Return the dtype that the method sees, or None where mergekit would fail, with the reason added.

    Args:
        planned: The tensor.
        entries: The models that have it.
        dtypes: Of each, once the recipe's dtype is applied.
        problems: Where to add what is wrong.
    """
    kinds = {str(dtype).removeprefix("torch."): model for dtype, (model, _) in zip(dtypes, entries, strict=True)}
    value = some((f"{name} in {model}" for name, model in kinds.items()), 4)
    if not all(dtype.is_floating_point for dtype in dtypes):
        if len(kinds) > 1:
            message = "an integer tensor must have one dtype in all models"
            problems.add("error", "tensor-dtype", planned.name, value, message, "choose other models")
            return None
        if len(entries) > 1:
            message = "an integer tensor must be equal in all models for mergekit to copy it, which takes reading it"
            problems.add("note", "integer-tensor", planned.name, value, message, "merge, and see")
        return dtypes[0]
    try:
        merged = dtypes[0]
        for dtype in dtypes[1:]:
            merged = torch.promote_types(merged, dtype)
    except RuntimeError as error:
        message = f"torch cannot promote the dtypes to one: {one_line(error)}"
        problems.add("error", "tensor-dtype", planned.name, value, message, "set dtype, such as dtype: bfloat16")
        return None
    if len(kinds) > 1:
        name = str(merged).removeprefix("torch.")
        message = f"mergekit promotes the dtypes of a tensor to one, here {name}"
        problems.add("warning", "dtypes-mixed", planned.name, value, message, "set dtype to the one you want")
    return merged


def check_base_dtype(
    planned: Planned, entries: Sequence[tuple[Model, Tensor]], dtype: str | None, problems: GroupedFindings
) -> None:
    """Warn where a base in another dtype than the sub-models leaves nothing to resample.

    Args:
        planned: The tensor.
        entries: The models that have it.
        dtype: The recipe's.
        problems: Where to add what is wrong.
    """
    if planned.base is None:
        return
    base = next((tensor.dtype for model, tensor in entries if model == planned.base), None)
    others = {tensor.dtype for model, tensor in entries if model != planned.base}
    if base is None or others <= {base}:
        return
    # Where the recipe's dtype rounds both to the coarser, equal parameters come out equal again.
    names = {base, *others}
    if dtype and dtype_of(dtype) == min((dtype_of(n) for n in names), key=_precision):
        return
    problems.add(
        "warning",
        "base-dtype",
        planned.name,
        f"{base} in {planned.base}, {', '.join(sorted(others))} in the sub-models",
        "the base must have the sub-models' dtype, or hardly any parameter equals it and nothing is resampled",
        "set dtype to the coarser one, or give the base as the sub-models began from it",
    )


def dtype_of(name: str | None) -> torch.dtype | None:
    """Mergekit's reading of a dtype's name, and torch's where mergekit has none."""
    try:
        dtype: torch.dtype | None = dtype_from_name(name)
    except RuntimeError:
        dtype = getattr(torch, str(name), None)
    return dtype


def _precision(dtype: torch.dtype | None) -> float:
    return -torch.finfo(dtype).eps if dtype is not None and dtype.is_floating_point else math.inf
