"""What makes mutants of a source: operators of cosmic-ray for Python, and some more for statements and for C."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One change of one source.

    Attributes:
        operator: What was done.
        line: Where, counted from 1.
        source: The whole source after it.
        before: The line before it.
        after: The line after it; empty where the line is gone.
    """

    operator: str
    line: int
    source: str
    before: str
    after: str


# Of all replacements of each operator by another, those that a hand could slip into. `|` stands in annotations only.
_REPLACEMENTS = {
    "Add": ("Sub",),
    "Sub": ("Add",),
    "Mul": ("Add", "FloorDiv"),
    "Div": ("Mul",),
    "FloorDiv": ("Mul",),
    "Mod": ("Mul", "FloorDiv"),
    "LShift": ("RShift",),
    "RShift": ("LShift",),
    "BitAnd": ("BitOr", "BitXor"),
    "BitXor": ("BitAnd", "BitOr"),
    "Pow": ("Mul",),
    "Eq": ("NotEq", "GtE"),
    "NotEq": ("Eq",),
    "Lt": ("LtE", "GtE"),
    "LtE": ("Lt", "Gt"),
    "Gt": ("GtE", "LtE"),
    "GtE": ("Gt", "Lt"),
    "Is": ("IsNot",),
    "IsNot": ("Is",),
}
# As they stand in kernel.c, with blanks on both sides; what else has these characters is not an operator there.
_C = (
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" % ", " / "),
    (r" < ", " <= "),
    (r" < ", " > "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" << ", " >> "),
    (r" >> ", " << "),
    (r" & ", " | "),
    (r" \^ ", " & "),
    (r" \|= ", " = "),
    (r" &= ", " = "),
    (r" \^= ", " = "),
    (r" \+= ", " = "),
    (r"~", ""),
    (r"\b0\b", "1"),
    (r"\b1\b", "0"),
    (r"\b1\b", "2"),
    (r"\b(30|27|31)\b", "29"),
    (r"\bkeys\[round\]", "keys[0]"),
    (r"\bNEVER\b", "HALF"),
    (r"\breturn;", ";"),
    (r"^ {8,}(?!return|const|for|if|else|uint|int|size_t)[a-z][^=;{]*(=|\()[^;{]*;$", ";"),
)


def mutants(path: Path) -> Iterator[Mutant]:
    """Return the mutants of a source in Python or C, each once."""
    source = path.read_text()
    seen = {source}
    found = _of_c(source) if path.suffix == ".c" else _of_python(source)
    for operator, mutated in found:
        if mutated not in seen:
            seen.add(mutated)
            yield _described(operator, source, mutated)


def _described(operator: str, source: str, mutated: str) -> Mutant:
    before, after = source.splitlines(), mutated.splitlines()
    line = next(
        (k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    return Mutant(operator, line + 1, mutated, before[line].strip(), after[line].strip() if line < len(after) else "")


def _of_python(source: str) -> Iterator[tuple[str, str]]:
    # In this function only: the suite's own run imports this module without cosmic-ray.
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    for name in operator_names():
        kind = name.partition("/")[2]
        if kind.startswith("Variable") or not _wanted(kind):  # those need to be told which variable
            continue
        occurrence = 0
        while (mutated := mutate_code(source, get_operator(name)(), occurrence)) is not None:
            occurrence += 1
            if _is_python(mutated):
                yield kind, mutated
    yield from _statements(source)


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _wanted(kind: str) -> bool:
    if not kind.startswith(("ReplaceBinaryOperator_", "ReplaceComparisonOperator_")):
        return True
    _, before, after = kind.split("_")
    return after in _REPLACEMENTS.get(before, ())


def _statements(source: str) -> Iterator[tuple[str, str]]:
    """Leave out a call, an assignment in place or a raise; return nothing instead of something."""
    lines = source.encode().split(b"\n")
    for node in ast.walk(ast.parse(source)):
        is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if is_call or isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue)):
            name, instead = "LeaveOutStatement", b"pass"
        elif isinstance(node, ast.Return) and node.value is not None:
            name, instead = "ReturnNone", b"return None"
        else:
            continue
        assert isinstance(node, ast.stmt)
        assert node.end_lineno is not None
        head, tail = lines[node.lineno - 1][: node.col_offset], lines[node.end_lineno - 1][node.end_col_offset :]
        mutated = [*lines[: node.lineno - 1], head + instead + tail, *lines[node.end_lineno :]]
        yield name, b"\n".join(mutated).decode()


def _of_c(source: str) -> Iterator[tuple[str, str]]:
    lines = source.splitlines(keepends=True)
    code = _without_comments(source).splitlines(keepends=True)
    for k, line in enumerate(code):
        if line.startswith(("#", "const char")):
            continue
        for pattern, instead in _C:
            for match in re.finditer(pattern, line.rstrip("\n")):
                mutated = lines[k][: match.start()] + instead + lines[k][match.end() :]
                yield f"{match[0].strip()} -> {instead.strip()}", "".join([*lines[:k], mutated, *lines[k + 1 :]])


def _without_comments(source: str) -> str:
    """Return the source with blanks where comments are."""
    return re.sub(r"/\*.*?\*/", lambda match: re.sub(r"[^\n]", " ", match[0]), source, flags=re.DOTALL)
