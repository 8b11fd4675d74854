"""The floor of any method under mergekit: reads the same tensors as the others and returns the first."""

import torch
from mergekit.merge_methods import BasePolicy, InputContract, TensorGroup, merge_method


@merge_method(name="benchmark_floor", contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1))
def benchmark_floor(group: TensorGroup) -> torch.Tensor:
    """Return the first sub-model's tensor, not even copied."""
    return group.non_base[0].tensor
