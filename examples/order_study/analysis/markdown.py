"""Tables and numbers as Markdown."""

from collections.abc import Iterable, Sequence


def percent(share: float | None, deviation: float | None = None) -> str:
    """A share and its spread; nothing where it was not measured."""
    if share is None:
        return ""
    return f"{share:.2%}" + ("" if deviation is None else f" ± {deviation:.2%}")


def signed(value: float, share: bool = False) -> str:
    """A difference; of shares in percentage points."""
    return f"{100 * value:+.2f} pp" if share else f"{value:+.4f}"


def probability(p: float, sign: str = "") -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else f"{sign}{p:.3f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Rows below a head; `align` has a letter for each column, l for text and r for numbers."""
    rule = [{"l": ":--", "r": "--:"}[letter] for letter in align]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))
