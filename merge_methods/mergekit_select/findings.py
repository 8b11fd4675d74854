"""What ``check`` reports: findings and costs as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

SCHEMA_VERSION = 1


class Severity(str, Enum):
    """How bad: an error makes the merge fail or go silently wrong, a warning may, a note is for information."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


# Every kind of finding, with what it says; docs/cli.md lists them.
KINDS = {
    "recipe-invalid": "the recipe does not have the shape that mergekit reads",
    "unknown-key": "a key that mergekit ignores without a word",
    "duplicate-key": "a key stands twice, and YAML keeps the last without a word",
    "unknown-method": "no merge method of that name is registered",
    "plugin-inactive": "stock mergekit will not know the method in this environment",
    "parameter-missing": "the method needs a parameter that the recipe does not give",
    "parameter-invalid": "the method refuses the value of a parameter",
    "weight-not-finite": "a weight is infinite or not a number",
    "weights-zero": "the weights of a tensor's sub-models sum to 0 after filters and gradients",
    "base-parameter-ignored": "a parameter is given to the base model, where mergekit ignores it",
    "dtype-unknown": "mergekit does not know the dtype",
    "chat-template": "mergekit does not know the chat template",
    "inputs": "the method takes another number or kind of models",
    "no-base-model": "mergekit takes config and tokenizer from an arbitrary model",
    "tokenizer-union": "the order of a union vocabulary changes from run to run",
    "local-path-like-hub-id": "mergekit asks the hub about a local path when it writes the model card",
    "hub-id-not-pinned": "a hub id without a commit need not give the same bits tomorrow",
    "hub-unreachable": "the hub cannot be asked",
    "model-missing": "a model is not there, or not complete",
    "model-unreadable": "a file of a model is not what it should be",
    "model-pickled": "a model is stored as pickles",
    "model-ambiguous": "a folder holds two checkpoints",
    "model-quantised": "a model is quantised, or in a format that mergekit does not read",
    "config-invalid": "transformers or mergekit cannot use a model's config.json",
    "remote-code": "a model brings code of its own",
    "lora-cache": "a LoRA adapter is given without a usable cache folder to merge it in",
    "lora-cache-stale": "the LoRA merge cache holds an older or unfinished merge of the adapter",
    "lora-invalid": "a LoRA adapter does not fit its model, or its files are not what they should be",
    "same-file": "two models are the same file",
    "architecture-differs": "the models have different architectures",
    "layers-differ": "the models have different numbers of layers",
    "layer-range": "a slice asks for layers that the model does not have",
    "slices-uneven": "the last slice has more sources than the first, and mergekit leaves some out at the end",
    "tensor-missing": "a tensor is missing that the merge needs",
    "tensor-partial": "an optional tensor is missing from some of the models",
    "tensor-ignored": "a model has tensors that mergekit leaves out",
    "shapes-differ": "a tensor's shapes differ between the models",
    "tensor-dtype": "a tensor has a dtype that cannot be merged",
    "integer-tensor": "an integer tensor must be equal in all models, which takes reading it",
    "dtypes-mixed": "a tensor's dtypes differ between the models",
    "base-dtype": "the base is stored in another dtype than the sub-models",
    "tokenizers-differ": "the models' tokenizers give different ids to the same tokens",
    "tokenizer-invalid": "mergekit cannot build the output's tokenizer",
    "ties-differ": "weights are tied in one model and untied in another",
    "tokenizer-missing": "the output will have no tokenizer",
    "dry-run": "the method fails on small random tensors of the same dtypes with the same parameters",
    "plan-failed": "mergekit cannot plan the merge",
    "not-known": "something cannot be known without reading more",
    "out-not-writable": "the output folder cannot be written",
    "out-stale": "the output folder holds files of an earlier merge",
    "out-is-input": "the output folder is one of the inputs",
    "out-name": "the model card will have no title",
    "disk-full": "the output does not fit on the disk",
    "memory": "the merge is expected to need more memory than there is",
}


@dataclass(frozen=True)
class Finding:
    """One thing that ``check`` found.

    Attributes:
        kind: One of ``KINDS``.
        severity: Whether it makes the merge fail or go silently wrong.
        place: Recipe key, or model and tensor, or file.
        value: What stands there.
        message: The rule that it breaks, and what happens.
        remedy: What to do.
    """

    kind: str
    severity: Severity
    place: str
    value: str
    message: str
    remedy: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of KINDS, got {self.kind!r}")

    def __str__(self) -> str:
        value = f" (got {self.value})" if self.value else ""
        return f"{self.severity.value} {self.kind} at {self.place}: {self.message}{value}; {self.remedy}"

    def within(self, name: str) -> Finding:
        """Return the finding with its place inside the named part of a recipe."""
        return replace(self, place=f"{name}: {self.place}")


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
    """The answer of ``check``."""

    recipe: str
    out: str | None
    findings: tuple[Finding, ...]
    costs: tuple[Cost, ...]

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity is severity)

    def passes(self, strict: bool = False) -> bool:
        """Whether the merge would work: no errors and, if strict, no warnings."""
        return not self.of(Severity.ERROR) and not (strict and self.of(Severity.WARNING))

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data under a schema version."""
        return {
            "schema": SCHEMA_VERSION,
            "command": "check",
            "recipe": self.recipe,
            "out": self.out,
            "ok": self.passes(),
            "findings": [{**asdict(finding), "severity": finding.severity.value} for finding in self.findings],
            "costs": [asdict(cost) for cost in self.costs],
        }


class Findings(list[Finding]):
    """A list to collect findings in, each with its severity as the method's name."""

    def error(self, kind: str, place: str, value: object, message: str, remedy: str) -> None:
        """Add an error."""
        self._add(Severity.ERROR, kind, place, value, message, remedy)

    def warning(self, kind: str, place: str, value: object, message: str, remedy: str) -> None:
        """Add a warning."""
        self._add(Severity.WARNING, kind, place, value, message, remedy)

    def note(self, kind: str, place: str, value: object, message: str, remedy: str) -> None:
        """Add a note."""
        self._add(Severity.NOTE, kind, place, value, message, remedy)

    def has_errors(self) -> bool:
        """Whether any is an error."""
        return any(finding.severity is Severity.ERROR for finding in self)

    def _add(self, severity: Severity, kind: str, place: str, value: object, message: str, remedy: str) -> None:
        self.append(Finding(kind, severity, place, one_line(value), message, remedy))


def one_line(value: object, limit: int = 300) -> str:
    """Return the value's text on one line of bounded length."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def some(names: Iterable[object], most: int = 3) -> str:
    """Name the first few, and how many more there are."""
    listed = [str(name) for name in names]
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


@dataclass
class _Problem:
    severity: str
    tensors: list[str] = field(default_factory=list)


class GroupedFindings:
    """Findings that differ in the tensor only, gathered into one each."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.problems: dict[tuple[str, str, str, str, str], _Problem] = {}

    def add(
        self, severity: str, kind: str, tensor: str, value: object, message: str, remedy: str, who: str = ""
    ) -> None:
        """Add a problem of one tensor; ``who`` is the model that has it, where only one does."""
        problem = self.problems.setdefault((kind, who, one_line(value), message, remedy), _Problem(severity))
        problem.tensors.append(tensor)

    def flush(self) -> None:
        """Hand on what was gathered."""
        for (kind, who, value, message, remedy), problem in self.problems.items():
            place = f"{who}{'tensors' if len(problem.tensors) > 1 else 'tensor'} {some(problem.tensors)}"
            getattr(self.findings, problem.severity)(kind, place, value, message, remedy)
