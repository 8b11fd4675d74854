"""What a command answers: findings, each of a kind from the catalogue in ``kinds``, and ``check``'s report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from mergekit_select.errors import UnreadableError, one_line


class Severity(str, Enum):
    """How bad: an error makes the merge fail or go silently wrong, a warning may, a note is for information."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Kind:
    """One rule that can be broken. Several kinds may share a name, by which reports tell them.

    Attributes:
        name: As reports and docs/cli.md call it.
        severity: Of its findings.
        rule: The rule, and what happens where it is broken; ``{name}`` stands for a detail of the finding.
        remedy: What to do, likewise; empty where there is nothing to do.
    """

    name: str
    severity: Severity
    rule: str
    remedy: str = ""

    def text(self, **details: Any) -> str:
        """Return rule and remedy in one sentence, with these details filled in."""
        return "; ".join(part.format(**details) for part in (self.rule, self.remedy) if part)


class UnusableModelError(UnreadableError):
    """A model that mergekit could not merge; ``check`` reports it as a finding.

    Attributes:
        kind: What is wrong.
        details: What the kind's texts mention.
    """

    def __init__(self, kind: Kind, **details: Any) -> None:
        super().__init__(kind.text(**details))
        self.kind = kind
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:  # Ray brings errors home from other machines
        return _unusable, (self.kind, self.details)


def _unusable(kind: Kind, details: dict[str, Any]) -> UnusableModelError:
    return UnusableModelError(kind, **details)


@dataclass(frozen=True)
class Finding:
    """One thing that a command found.

    Attributes:
        kind: Name of its kind.
        severity: Whether it makes the merge fail or go silently wrong.
        place: Recipe key, or model and tensor, or file.
        value: What stands there; empty where the rule says all.
        message: The rule that it breaks, and what happens.
        remedy: What to do; empty where there is nothing to do.
    """

    kind: str
    severity: Severity
    place: str
    value: str
    message: str
    remedy: str

    @property
    def text(self) -> str:
        """Rule and remedy in one sentence."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message

    def __str__(self) -> str:
        value = f" (got {self.value})" if self.value else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.severity.value} {self.kind} at {self.place}: {self.message}{value}{remedy}"

    def within(self, name: str) -> Finding:
        """Return the finding with its place inside the named part of a recipe."""
        return replace(self, place=f"{name}: {self.place}")


def finding(kind: Kind, place: str, value: object = "", /, **details: Any) -> Finding:
    """Make a finding of a kind.

    Args:
        kind: From the catalogue.
        place: Where it is.
        value: What stands there; put on one line.
        details: What the kind's texts mention.
    """
    return Finding(
        kind.name,
        kind.severity,
        place,
        one_line(value),
        kind.rule.format(**details),
        kind.remedy.format(**details),
    )


class Findings(list[Finding]):
    """A list to collect findings in."""

    def add(self, kind: Kind, place: str, value: object = "", /, **details: Any) -> None:
        """Add a finding; see ``finding``."""
        self.append(finding(kind, place, value, **details))

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of one severity."""
        return tuple(found for found in self if found.severity is severity)


class TensorFindings:
    """Findings that differ in the tensor only, gathered into one each."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._tensors: dict[Finding, list[str]] = {}

    def add(self, kind: Kind, tensor: str, value: object = "", /, who: str = "", **details: Any) -> None:
        """Add a finding about one tensor; ``who`` is the model that has it, where only one does."""
        self._tensors.setdefault(finding(kind, who, value, **details), []).append(tensor)

    def note(self, kind: Kind, place: str, value: object = "", /, **details: Any) -> None:
        """Add a finding that is about no single tensor."""
        self._findings.add(kind, place, value, **details)

    def has(self, kind: Kind) -> bool:
        """Whether a finding of this name was added."""
        return any(found.kind == kind.name for found in self._tensors)

    def flush(self) -> None:
        """Hand on what was gathered."""
        for found, tensors in self._tensors.items():
            who = f"{found.place}, " if found.place else ""
            place = f"{who}{'tensors' if len(tensors) > 1 else 'tensor'} {some(tensors)}"
            self._findings.append(replace(found, place=place))


@dataclass(frozen=True)
class Cost:
    """What one merge will take.

    Attributes:
        merge: The merge's name in a mergekit-multi recipe, else None.
        bytes_read: Of tensors, from disk or hub; files of several users are counted once for each.
        bytes_written: Of tensors.
        bytes_free: On the disk of the output; None when no output was given.
        peak_memory: Expected, in bytes, for mergekit's default executor on a CPU; None where it cannot be known.
        peak_tensor: The tensor whose inputs and result take most.
        tensors: How many tensors are written.
        unknown: How many of them have a size that is not known and not counted.
    """

    merge: str | None
    bytes_read: int
    bytes_written: int
    bytes_free: int | None
    peak_memory: int | None
    peak_tensor: str | None
    tensors: int
    unknown: int


@dataclass(frozen=True)
class Report:
    """The answer of ``check``.

    Attributes:
        recipe: The recipe's path.
        out: The output folder, if one was given.
        findings: What was found, in the order of the recipe's merges.
        costs: What each merge will take.
    """

    recipe: str
    out: str | None
    findings: tuple[Finding, ...]
    costs: tuple[Cost, ...]

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of one severity."""
        return Findings(self.findings).of(severity)

    def passes(self, strict: bool = False) -> bool:
        """Whether the merge would work: no errors and, if strict, no warnings."""
        return not self.of(Severity.ERROR) and not (strict and self.of(Severity.WARNING))


def some(names: Iterable[object], most: int = 3) -> str:
    """Name the first few, and how many more there are."""
    listed = [str(name) for name in names]
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
