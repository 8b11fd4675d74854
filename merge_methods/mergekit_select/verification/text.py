"""A verification as text, and as plain data."""

from __future__ import annotations

from typing import Any

from mergekit_select.planner.determinism import Determinism
from mergekit_select.verification.comparison import Difference
from mergekit_select.verification.verify import Verification

_SHOWN = 20  # differences that are listed one by one


def as_data(answer: Verification) -> dict[str, Any]:
    """Return the answer as plain data."""
    problems = [{"kind": problem.kind, "place": problem.place, "text": problem.text} for problem in answer.problems]
    notes = [note.text for note in answer.notes]
    return {"ok": answer.same, **vars(answer), "problems": problems, "notes": notes}


def render(answer: Verification) -> list[str]:
    """Return the answer as lines of text."""
    lines = [f"{problem.kind}: {problem.place}: {problem.text}" for problem in answer.problems]
    lines += [_line(difference) for difference in answer.differences[:_SHOWN]]
    if len(answer.differences) > _SHOWN:
        lines.append(f"and {len(answer.differences) - _SHOWN} more; --json lists all")
    lines += [f"note: {note.text}" for note in answer.notes]
    lines.append(_verdict(answer))
    return lines


def _line(difference: Difference) -> str:
    kind, name = difference.kind, difference.tensor
    if kind == "missing":
        return f"missing: {name}: the recipe gives {difference.expected}"
    if kind == "extra":
        return f"extra: {name}: {difference.found}, the recipe gives none"
    if kind == "renamed":
        return f"renamed: {name}: the output calls it {difference.found}"
    if kind != "bits":
        return f"{kind}: {name}: expected {difference.expected}, found {difference.found}"
    return (
        f"bits: {name}: {difference.count:,} of {difference.elements:,} elements, first at "
        f"{list(difference.index or ())}: expected {difference.expected}, found {difference.found}"
    )


def _verdict(answer: Verification) -> str:
    if answer.recipe is None:
        return f"NOT VERIFIED: {answer.output} is unfinished, nothing was compared"
    recipe = "its recipe" if answer.recipe.parent == answer.output else str(answer.recipe)
    compared = f"{answer.tensors:,} tensors with {answer.parameters:,} parameters compared ({answer.method})"
    if answer.same:
        return f"SAME: every bit of {answer.output} is what {recipe} gives; {compared}"
    parts = []
    if any(problem.kind == "unfinished" for problem in answer.problems):
        parts.append("unfinished")
    if answer.differences:
        count = len(answer.differences)
        parts.append(f"{count:,} tensor{' is' if count == 1 else 's are'} not what {recipe} gives")
    elif not parts:
        parts.append("every tensor is what the recipe gives, but the files do not agree")
    if answer.undecided:
        random = answer.determinism is Determinism.RANDOM
        why = "the method is random" if random else "the order of a union of vocabularies is random"
        return f"UNDECIDED: {answer.output}: {'; '.join(parts)}, and {why}; {compared}"
    return f"NOT THE SAME: {answer.output}: {'; '.join(parts)}; {compared}"
