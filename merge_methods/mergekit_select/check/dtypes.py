"""Check one tensor's dtypes, and find the dtype that a merge method will see."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mergekit.common import ModelReference, dtype_from_name

from mergekit_select import kinds
from mergekit_select.bits import dtype_name
from mergekit_select.errors import one_line
from mergekit_select.findings import TensorFindings, some
from mergekit_select.inputs.checkpoint import StoredTensor
from mergekit_select.planner.plan import PlannedTensor


def merged_dtype(
    planned: PlannedTensor,
    entries: Sequence[tuple[ModelReference, StoredTensor]],
    dtypes: Sequence[torch.dtype],
    findings: TensorFindings,
) -> torch.dtype | None:
    """Return the dtype that the method sees, or None where mergekit would fail, with the reason added.

    Args:
        planned: The tensor.
        entries: The models that have it.
        dtypes: Of each, once the recipe's dtype is applied.
        findings: Where to add what is wrong.
    """
    holders = {dtype_name(dtype): model for dtype, (model, _) in zip(dtypes, entries, strict=True)}
    value = some((f"{name} in {model}" for name, model in holders.items()), 4)
    if not all(dtype.is_floating_point for dtype in dtypes):
        if len(holders) > 1:
            findings.add(kinds.TENSOR_DTYPES_DIFFER, planned.name, value)
            return None
        if len(entries) > 1:
            findings.add(kinds.INTEGER_TENSOR, planned.name, value)
        return dtypes[0]
    try:
        merged = dtypes[0]
        for dtype in dtypes[1:]:
            merged = torch.promote_types(merged, dtype)
    except RuntimeError as error:
        findings.add(kinds.TENSOR_DTYPE, planned.name, value, problem=one_line(error))
        return None
    if len(holders) > 1:
        findings.add(kinds.DTYPES_MIXED, planned.name, value, dtype=dtype_name(merged))
    return merged


def check_base_dtype(
    planned: PlannedTensor,
    entries: Sequence[tuple[ModelReference, StoredTensor]],
    dtype: str | None,
    findings: TensorFindings,
) -> None:
    """Warn where a base in another dtype than the sub-models leaves nothing to resample.

    Args:
        planned: The tensor.
        entries: The models that have it.
        dtype: The recipe's.
        findings: Where to add what is wrong.
    """
    if planned.base is None:
        return
    base = next((tensor.dtype for model, tensor in entries if model == planned.base), None)
    others = {tensor.dtype for model, tensor in entries if model != planned.base}
    if base is None or others <= {base}:
        return
    # Where the recipe's dtype rounds both to the coarser, equal parameters come out equal again.
    if dtype and dtype_of(dtype) == min((dtype_of(name) for name in {base, *others}), key=_precision):
        return
    value = f"{base} in {planned.base}, {', '.join(sorted(others))} in the sub-models"
    findings.add(kinds.BASE_DTYPE, planned.name, value)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return mergekit's reading of a dtype's name, and torch's where mergekit has none."""
    try:
        dtype: torch.dtype | None = dtype_from_name(name)
    except RuntimeError:
        dtype = getattr(torch, str(name), None)
    return dtype


def _precision(dtype: torch.dtype | None) -> float:
    return -torch.finfo(dtype).eps if dtype is not None and dtype.is_floating_point else math.inf
