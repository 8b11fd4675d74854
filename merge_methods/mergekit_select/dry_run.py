"""Run a merge method once on small random tensors: whether it takes the dtypes and parameters, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods import MergeMethod, TensorEntry, TensorGroup, TensorMetadata

from mergekit_select.findings import one_line

_SIDE = 8  # elements along each axis at most; enough for sparsification and norms


def dry_run(
    method: MergeMethod,
    dtype: torch.dtype,
    shape: Sequence[int],
    ids: Sequence[Any],
    base: Any,
    parameters: Mapping[str, Any],
    name: str,
) -> tuple[str, torch.dtype | None]:
    """Return why the method fails on such inputs, or an empty string, and the dtype of its result.

    Args:
        method: The method.
        dtype: Of the inputs, promoted.
        shape: Of the tensor; its axes are cut short.
        ids: Of the inputs.
        base: The id of the base model, or None.
        parameters: Resolved, those of inputs as sequences.
        name: Of the tensor.
    """
    generator = torch.Generator().manual_seed(0)
    small = [min(length, _SIDE) for length in shape]
    entries = tuple(
        TensorEntry(model, torch.randn(small, generator=generator).to(dtype), is_base=model == base) for model in ids
    )
    group = TensorGroup(entries, TensorMetadata(name=name))
    try:
        # Some methods draw from torch's global generator, which is the caller's.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            (result,) = method((group,), parameters=parameters)
    except Exception as error:
        return (
            f"{method.spec.name} fails on tensors of these dtypes with these parameters: {one_line(error)}",
            None,
        )
    if result.is_floating_point() and not bool(torch.isfinite(result.float()).all()):
        problem = f"{method.spec.name} makes NaN or infinite values of finite ones with these parameters"
        return problem, result.dtype
    return "", result.dtype
