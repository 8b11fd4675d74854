"""Compare the tensors of an output with those that its recipe gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mergekit_select import kinds
from mergekit_select.bits import count_differing, describe, digest, flat_integers
from mergekit_select.findings import Findings
from mergekit_select.verification.output import Output


@dataclass(frozen=True)
class Difference:
    """One tensor that is not what the recipe says.

    Attributes:
        tensor: Its name.
        kind: ``missing``, ``extra``, ``renamed``, ``dtype``, ``shape`` or ``bits``.
        expected: What the recipe gives; of ``bits``, the first element that differs.
        found: What the output holds; of ``renamed``, the other name.
        count: Elements that differ; None except for ``bits``.
        elements: Elements of the tensor.
        index: Where the first of them is; None except for ``bits``.
    """

    tensor: str
    kind: str
    expected: str | None
    found: str | None
    count: int | None = None
    elements: int | None = None
    index: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Compared:
    """What came of comparing one tensor.

    Attributes:
        elements: How many the output's has; 0 where it has no such tensor.
        nbytes: Its bytes.
        difference: In what it is not the recipe's.
        missing: Description and digest of the recipe's, where the output has none of that name.
    """

    elements: int
    nbytes: int
    difference: Difference | None = None
    missing: tuple[str, str] | None = None


def compared(output: Output, name: str, expected: torch.Tensor | None) -> Compared | None:
    """Compare one tensor of the output with the recipe's; None for one that the merge skips."""
    if expected is None:
        return None
    if name not in output.files:
        return Compared(0, 0, missing=(describe(expected), digest(expected)))
    found = output.read(name)
    return Compared(found.numel(), found.nbytes, _difference(name, expected, found))


class Comparison:
    """Collects what differs while the recipe's tensors go by.

    Attributes:
        tensors: How many tensors were compared.
        parameters: How many elements these have.
        differences: Those that are not what the recipe says.
        problems: Why the output disagrees with itself.
    """

    def __init__(self, output: Output):
        self.output = output
        self.tensors = 0
        self.parameters = 0
        self.differences: list[Difference] = []
        self.problems = Findings()
        self._bytes = 0
        self._seen: set[str] = set()
        self._missing: list[tuple[str, str, str]] = []

    def add(self, name: str, result: Compared | None) -> None:
        """Take what came of one tensor."""
        if result is None:
            return
        if result.missing is not None:
            self._missing.append((name, *result.missing))
            return
        self._seen.add(name)
        self.tensors += 1
        self.parameters += result.elements
        self._bytes += result.nbytes
        if result.difference is not None:
            self.differences.append(result.difference)

    def finish(self) -> None:
        """Compare what is left: tensors that only one side has."""
        extra = {}
        for name in sorted(self.output.files.keys() - self._seen):
            found = self.output.read(name)
            self._bytes += found.nbytes
            extra[name] = (describe(found), digest(found) if self._missing else "")
        for name, expected, expected_digest in self._missing:
            twin = next((other for other, (_, its) in extra.items() if its == expected_digest), None)
            if twin is None:
                self.differences.append(Difference(name, "missing", expected, None))
            else:
                del extra[twin]
                self.differences.append(Difference(name, "renamed", name, twin))
        for name, (description, _) in extra.items():
            self.differences.append(Difference(name, "extra", None, description))
        size, index = self.output.total_size, self.output.index
        complete = not any(problem.kind == "unfinished" for problem in self.output.problems)
        if index is not None and complete and size is not None and size != self._bytes:
            text = f"metadata.total_size must be the {self._bytes} bytes of the tensors, got {size!r}"
            self.problems.add(kinds.FILES_DISAGREE, index, problem=text)


def _difference(name: str, expected: torch.Tensor, found: torch.Tensor) -> Difference | None:
    for kind in ("dtype", "shape"):
        if getattr(expected, kind) != getattr(found, kind):
            return Difference(name, kind, describe(expected), describe(found), elements=found.numel())
    count, first = count_differing(expected, found)
    if not count:
        return None
    return Difference(
        tensor=name,
        kind="bits",
        expected=_element(expected, first),
        found=_element(found, first),
        count=count,
        elements=expected.numel(),
        index=tuple(map(int, np.unravel_index(first, tuple(expected.shape)))),
    )


def _element(tensor: torch.Tensor, position: int) -> str:
    """Return one element as its value and its bits: two values that look alike may differ in these."""
    bits = flat_integers(tensor)
    width = bits.element_size() * 8
    value = tensor.detach().to("cpu").reshape(-1)[position]
    shown = f"{value.double().item():.9g}" if value.is_floating_point() else str(value.item())
    return f"{shown} (0x{int(bits[position]) % (1 << width):0{width // 4}x})"
