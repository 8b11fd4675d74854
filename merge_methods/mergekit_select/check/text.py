"""A report of ``check`` as text, and as plain data."""

from __future__ import annotations

from typing import Any

from mergekit_select.check.cost import size_text
from mergekit_select.findings import Cost, Report, Severity


def as_data(report: Report) -> dict[str, Any]:
    """Return the report as plain data."""
    return {"recipe": report.recipe, "out": report.out, "ok": report.passes(), **vars(report)}


def render(report: Report) -> list[str]:
    """Return the report as lines of text, a finding a line, the worst first."""
    lines = [str(finding) for severity in Severity for finding in report.of(severity)]
    lines += [_cost(cost) for cost in report.costs]
    counts = [_count(len(report.of(severity)), severity.value) for severity in Severity]
    verdict = "this merge would work" if report.passes() else "this merge would not work"
    if report.passes() and any(finding.kind == "not-known" for finding in report.findings):
        verdict += ", as far as can be known"
    return [*lines, f"{verdict}: {', '.join(counts)}"]


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _cost(cost: Cost) -> str:
    name = f"{cost.merge}: " if cost.merge else ""
    free = "" if cost.bytes_free is None else f" ({size_text(cost.bytes_free)} free)"
    if cost.peak_memory is None:
        return f"{name}nothing would be written"
    least = f", at least, since {cost.unknown} have an unknown size" if cost.unknown else ""
    return (
        f"{name}reads {size_text(cost.bytes_read)}, writes {cost.tensors} tensors, {size_text(cost.bytes_written)}"
        f"{free}; peak memory about {size_text(cost.peak_memory)}, at {cost.peak_tensor}{least}"
    )
