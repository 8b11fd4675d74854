"""What is varied: the cases of the kernel benchmark, around one headline case."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

KI, MI = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Case:
    """One line of the grid.

    Attributes:
        sub_models: Their number, K.
        dtype: Of the elements, a torch name.
        elements: Of the one tensor that is merged.
        threads: Given to ``torch.set_num_threads``.
        unchanged: Share of a sub-model's parameters that equal the base's.
        busy: Whether another process keeps one core busy.
    """

    sub_models: int = 4
    dtype: str = "bfloat16"
    elements: int = 32 * MI
    threads: int = 2
    unchanged: float = 0.5
    busy: bool = False

    @property
    def inputs(self) -> tuple[int, str, int, float]:
        """What the tensors depend on; cases that agree in it share them."""
        return self.sub_models, self.dtype, self.elements, self.unchanged

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one sub-model's tensor."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.elements * dtype.itemsize

    @property
    def size(self) -> str:
        """Number of elements, as text."""
        return f"{self.elements // MI} Mi" if self.elements % MI == 0 else f"{self.elements / KI:g} Ki"

    def __str__(self) -> str:
        text = f"K = {self.sub_models}, {self.dtype}, {self.size} elements, {self.threads} threads, "
        text += f"{self.unchanged:.0%} unchanged"
        return f"{text}, one core busy" if self.busy else text


HEADLINE = Case()
TINY = Case(elements=1 << 16)
# Most tensors of models of up to 1 G parameters have at most 4 Mi elements.
SMALL = (4 * KI, 64 * KI, 256 * KI, 1 * MI, 4 * MI)


def around(center: Case) -> list[Case]:
    """One thing varied at a time, and the small sizes in both dtypes. The headline is the first.

    Cases with the same inputs are neighbours. The largest takes 256 MiB a tensor, 1.5 GiB in all: the cost of an
    element must not depend on their number.
    """
    return [
        center,
        replace(center, threads=1),
        replace(center, busy=True),
        *(replace(center, unchanged=share) for share in (0.1, 0.9)),
        *(replace(center, sub_models=count) for count in (2, 8, 16)),
        replace(center, dtype="float32"),
        *small(center),
        replace(center, elements=128 * MI),
    ]


def small(center: Case) -> list[Case]:
    """Sizes from 4 Ki on, in both dtypes; and where it may decide, one thread, a busy core, few and many sub-models."""
    varied = [replace(center, elements=size, dtype=dtype) for size in SMALL for dtype in ("bfloat16", "float32")]
    edges = [replace(center, elements=64 * KI, sub_models=count, dtype="float32") for count in (2, 16)]
    return [*varied, *edges, replace(center, elements=MI, threads=1), replace(center, elements=MI, busy=True)]


def product() -> list[Case]:
    """Everything against everything, the headline first; hours."""
    axes = itertools.product(
        (2, 4, 8, 16), ("bfloat16", "float32"), (1 * MI, 8 * MI, 32 * MI, 128 * MI), (0.1, 0.5, 0.9), (1, 2)
    )
    cases = [Case(count, dtype, size, threads, share) for count, dtype, size, share, threads in axes]
    return [HEADLINE, replace(HEADLINE, busy=True), *(case for case in cases if case != HEADLINE)]


def for_memory(center: Case) -> list[Case]:
    """The cases whose peak memory is measured, each in processes of its own: what a buffer's size could depend on."""
    return [
        center,
        replace(center, threads=1),
        replace(center, dtype="float32"),
        replace(center, sub_models=16),
        replace(center, elements=4 * center.elements),
    ]
