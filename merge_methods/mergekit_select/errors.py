"""The errors that mergekit-select raises, one tree; what mergekit reports is left to mergekit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the types of pydantic's errors say of a value; of other types, pydantic's own text is kept.
_RULES = {
    "missing": "must be there",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "model_type": "must be a mapping",
    "string_type": "must be text",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "int_type": "must be an integer",
}


class MergekitSelectError(Exception):
    """Base of every error raised by mergekit-select.

    It is no ``ValueError``, since pydantic would bury the text of one under its own.
    """


class ParameterError(MergekitSelectError):
    """A recipe parameter, or an argument of the Python interface, breaks its rule."""


class TensorError(MergekitSelectError):
    """The tensors given for one output cannot be selected from as they are."""


class UnsupportedDtypeError(TensorError, TypeError):
    """A tensor's dtype is none that selection copies."""


class UnreadableError(MergekitSelectError):
    """A file is missing, or cannot be read as what it should be."""


class RecipeError(UnreadableError):
    """A recipe file cannot be read as one."""


class PlanError(MergekitSelectError):
    """Everything can be read, but mergekit refuses the merge."""


def one_line(value: object, limit: int = 300) -> str:
    """Return a value's text on one line of bounded length.

    An error of another package gets its type in front, unless it is one whose text is meant for people.
    """
    text = " ".join(_text(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def place_and_rule(problem: Mapping[str, Any]) -> tuple[str, str]:
    """Return where one of the errors of a ``pydantic.ValidationError`` is, as ``models[0].model``, and what it says."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    return place.removeprefix("."), _RULES.get(problem["type"], str(problem["msg"]).removeprefix("Value error, "))


def escaped(text: str) -> str:
    r"""Return a text with every character that a terminal would not show written as Python writes it, as ``\x1b``.

    Control characters move the cursor or begin new lines, some marks turn text around, and lone surrogates cannot be
    written at all.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _text(value: object) -> str:
    if not isinstance(value, Exception) or isinstance(value, MergekitSelectError):
        return str(value)
    problems = getattr(value, "errors", None)  # of a pydantic.ValidationError, whose text takes many lines
    if isinstance(value, ValueError) and callable(problems):
        place, rule = place_and_rule(problems()[0])
        return f"{place}: {rule}" if place else rule
    if isinstance(value, OSError) and value.strerror:
        return f"{value.strerror}: {value.filename}" if value.filename else value.strerror
    if type(value) in (RuntimeError, ValueError) and str(value):  # by which mergekit speaks to people
        return str(value)
    return f"{type(value).__name__}: {value}" if str(value) else type(value).__name__
