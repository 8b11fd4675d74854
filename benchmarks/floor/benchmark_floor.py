"""The floor of any method under mergekit, and what mergekit costs by itself.

mergekit hands out tensors that lie in mapped files: of what a method does not look at, not a byte is read.
"""

import torch
from mergekit.merge_methods import BasePolicy, InputContract, TensorGroup, merge_method

_CONTRACT = InputContract(base=BasePolicy.REQUIRED, min_non_base=1)


@merge_method(name="benchmark_floor", contract=_CONTRACT)
def benchmark_floor(group: TensorGroup) -> torch.Tensor:
    """Read every tensor, as fast as can be, and return the first sub-model's, not even copied."""
    for tensor in group.tensors:
        tensor.view(torch.int16).amax()
    return group.non_base[0].tensor


@merge_method(name="benchmark_unread", contract=_CONTRACT)
def benchmark_unread(group: TensorGroup) -> torch.Tensor:
    """Return the first sub-model's tensor; of the others nothing is read."""
    return group.non_base[0].tensor
