"""The exit codes, and the one map from errors to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from mergekit_select.errors import MergekitSelectError, UnreadableError, one_line

YES, NO, UNREADABLE = 0, 1, 2

_Command = TypeVar("_Command", bound=Callable[..., Any])


def exit_code(error: MergekitSelectError, refused: int) -> int:
    """Return the exit code for an error of ours: ``refused`` unless it is that something cannot be read."""
    return UNREADABLE if isinstance(error, UnreadableError) else refused


def one_line_errors(refused: int) -> Callable[[_Command], _Command]:
    """Let a command end with one line on stderr where it raises an error of ours.

    Args:
        refused: The exit code where everything can be read, and mergekit or a method refuses the merge.
    """

    def decorate(function: _Command) -> _Command:
        @functools.wraps(function)
        def command(*args: Any, **values: Any) -> Any:
            try:
                return function(*args, **values)
            except MergekitSelectError as error:
                click.echo(f"Error: {one_line(error, 10_000)}", err=True)
                raise click.exceptions.Exit(exit_code(error, refused)) from error

        return command  # type: ignore[return-value]  # the function, wrapped

    return decorate
