"""What is varied: the cases of the kernel benchmark, around one headline case."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

MI = 1 << 20


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

    def __str__(self) -> str:
        size = f"{self.elements // MI} Mi" if self.elements % MI == 0 else str(self.elements)
        text = f"K = {self.sub_models}, {self.dtype}, {size} elements, {self.threads} threads, "
        text += f"{self.unchanged:.0%} unchanged"
        return f"{text}, one core busy" if self.busy else text


HEADLINE = Case()
TINY = Case(elements=1 << 16)


def around(center: Case) -> list[Case]:
    """One thing varied at a time. Cases with the same inputs are neighbours; the headline is the first.

    The largest takes 1 GiB a tensor, 7 GiB in all: the cost of an element must not depend on their number.
    """
    return [
        center,
        replace(center, threads=1),
        replace(center, busy=True),
        *(replace(center, unchanged=share) for share in (0.1, 0.9)),
        *(replace(center, sub_models=count) for count in (2, 8, 16)),
        replace(center, dtype="float32"),
        *(replace(center, elements=count * MI) for count in (1, 8, 128, 512)),
    ]


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
