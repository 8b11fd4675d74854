"""Figures as Markdown: cells of three digits, and tables of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from timing import Spread

MISSING = "—"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table, the first column to the left and the others to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def digits(value: float | None, unit: str = "") -> str:
    """Return a number with three digits, or a dash where there is none."""
    if value is None:
        return MISSING
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}" if value else "0"
    return text + unit


def spread(value: Spread, scale: float = 1) -> str:
    """Return the median, and the extremes in brackets."""
    if value.runs == 1:
        return f"{digits(value.median * scale)} (one run)"
    return f"{digits(value.median * scale)} ({digits(value.low * scale)} to {digits(value.high * scale)})"


def machine(facts: dict[str, str | int | float]) -> str:
    """Return the description of the machine as a table."""
    return table(["machine", ""], ([key.replace("_", " "), str(value)] for key, value in facts.items()))
