"""Who runs: our methods, mergekit's, the naive way in torch, and two limits: a plain copy, and the speed of memory.

All are called through mergekit's ``merge_tensors``, the last three as merge methods of this benchmark's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from mergekit.merge_methods import MergeMethod, TensorGroup, merge_method, merge_tensors

import correctness
from inputs import NAME, Inputs
from mergekit_select.selection.limits import LIMITS, new_tensor

# Words of 64 bits that stay in the cache from one operation to the next; so few that torch does not share an operation
# among its threads.
_PIECE = 1 << 15


@merge_method(name="benchmark_copy")
def plain_copy(group: TensorGroup) -> torch.Tensor:
    """Copy the first sub-model: one pass that reads and writes, which no method that returns a tensor can beat."""
    return group.non_base[0].tensor.clone()


@merge_method(name="benchmark_memory")
def memory_speed(group: TensorGroup) -> torch.Tensor:
    """Read all sub-models, write one tensor, and compute next to nothing: what selection moves, at memory speed.

    In as many threads as torch has, and with huge pages for the result, as selection itself.
    """
    result = new_tensor(group.non_base[0].tensor, LIMITS)
    flat = [entry.tensor.view(torch.int64) for entry in group.non_base]
    pieces = zip(*(tensor.split(_PIECE) for tensor in (result.view(torch.int64), *flat)), strict=True)

    def combine(tensors: tuple[torch.Tensor, ...]) -> None:
        part, first, *others, last = tensors
        torch.bitwise_xor(first, last, out=part)
        for other in others:
            part.bitwise_xor_(other)

    threads = torch.get_num_threads() if result.nbytes >= LIMITS.shared_bytes else 1
    _ = [*(_pool(threads).map(combine, pieces) if threads > 1 else map(combine, pieces))]
    return result


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@merge_method(name="benchmark_naive")
def naive(group: TensorGroup) -> torch.Tensor:
    """Select a parameter as torch's documentation suggests: stack the sub-models, draw an index, gather."""
    stacked = torch.stack([entry.tensor for entry in group.non_base])
    index = torch.randint(len(stacked), (1, *stacked.shape[1:]))
    return stacked.gather(0, index).squeeze(0)


@dataclass(frozen=True)
class Contestant:
    """A way to merge a case's inputs.

    Attributes:
        name: In tables and results.
        method: What ``merge_tensors`` is given.
        check: Raises unless a result is right.
        base: Whether the base is passed.
        parameters: Of the method.
        stacks: Whether it holds all inputs at once, in several copies.
    """

    name: str
    method: str | MergeMethod
    check: Callable[[Inputs, torch.Tensor], None]
    base: bool = True
    parameters: Mapping[str, object] = field(default_factory=dict)
    stacks: bool = False

    def merge(self, inputs: Inputs) -> torch.Tensor:
        """Merge the inputs as a user of mergekit's in-memory interface would."""
        tensors = [inputs.base, *inputs.models] if self.base else list(inputs.models)
        index = 0 if self.base else None
        return merge_tensors(tensors, self.method, parameters=self.parameters, base_index=index, name=NAME)


COPY = "copy of one tensor"
MEMORY = "all read, one written"
LINEAR = "linear"
SELECTION = "parameter_selection"
RESAMPLING = "parameter_selection_resampling"


def _resampling(rounds: int) -> Contestant:
    check = partial(correctness.check_resampling, rounds=rounds)
    return Contestant(f"{RESAMPLING}, rounds {rounds}", RESAMPLING, check, parameters={"rounds": rounds})


def _task_arithmetic(method: str, **parameters: float) -> Contestant:
    # Weights and densities as users write them: a density of 1 would skip the work that makes these methods.
    parameters = {"weight": 0.25, **parameters}
    return Contestant(method, method, correctness.check_finite, parameters=parameters, stacks=True)


OURS = (
    Contestant(SELECTION, SELECTION, correctness.check_selection, base=False),
    Contestant(RESAMPLING, RESAMPLING, correctness.check_resampling),
    *(_resampling(rounds) for rounds in (1, 2, 3)),
)
ALL = (
    Contestant(COPY, plain_copy, correctness.check_copy, base=False),
    Contestant(MEMORY, memory_speed, correctness.check_xor, base=False),
    *OURS,
    Contestant(LINEAR, "linear", correctness.check_finite, base=False, parameters={"weight": 1.0}),
    _task_arithmetic("task_arithmetic"),
    _task_arithmetic("dare_linear", density=0.5),
    _task_arithmetic("dare_ties", density=0.5),
    _task_arithmetic("ties", density=0.5),
    Contestant("naive torch", naive, correctness.check_one_of_the_models, base=False, stacks=True),
)
# What runs in every case; the others run in the first only.
ALWAYS = (COPY, MEMORY, LINEAR, *(contestant.name for contestant in OURS))
BY_NAME = {contestant.name: contestant for contestant in ALL}
