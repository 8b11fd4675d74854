"""Whether a merge method gives the same bits again."""

from __future__ import annotations

from enum import Enum

from mergekit.merge_methods import get as get_method
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.sparsify import SparsificationMethod


class Determinism(Enum):
    """Whether a method gives the same bits again."""

    EXACT = "exact"
    ARITHMETIC = "arithmetic"
    RANDOM = "random"
    UNKNOWN = "unknown"


# Methods that copy, and need no arithmetic.
_EXACT = frozenset({"parameter_selection", "parameter_selection_resampling", "passthrough"})
# Methods that add and multiply: another device, number of threads or version of torch may round otherwise.
_ARITHMETIC = frozenset(
    {
        "breadcrumbs",
        "breadcrumbs_ties",
        "karcher",
        "linear",
        "model_stock",
        "multislerp",
        "nearswap",
        "nuslerp",
        "ram",
        "ramplus_tl",
        "sce",
        "slerp",
        "task_arithmetic",
        "ties",
    }
)
# Methods that draw from torch's generator; arcee_fusion samples quantiles of tensors of more than a million elements.
_RANDOM = frozenset({"dare_ties", "dare_linear", "della", "della_linear", "arcee_fusion"})
_RANDOM_MASKS = (SparsificationMethod.random, SparsificationMethod.della_magprune)


def determinism(method_name: str) -> Determinism:
    """Return what is known of a merge method by its name; a third-party method is unknown."""
    if method_name in _EXACT:
        return Determinism.EXACT
    if method_name in _RANDOM:
        return Determinism.RANDOM
    if method_name in _ARITHMETIC:
        return Determinism.ARITHMETIC
    try:
        method = get_method(method_name)
    except RuntimeError:
        return Determinism.UNKNOWN
    if isinstance(method, GeneralizedTaskArithmeticMerge) and method.sparsification_method in _RANDOM_MASKS:
        return Determinism.RANDOM
    return Determinism.UNKNOWN
