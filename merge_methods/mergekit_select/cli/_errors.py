"""The exit codes, and the one map from errors to them.

A code below 64 is an answer, or says that the question cannot be put; all others mean that there is none.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from mergekit_select.cli._output import drop_output, print_error
from mergekit_select.errors import MergekitSelectError, UnreadableError, escaped, one_line

YES, NO, UNREADABLE = 0, 1, 2
INTERNAL = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 and the number of the signal, as shells have it; SIGTERM gives 143 by itself
DEBUG = "MERGEKIT_SELECT_DEBUG"  # set to 1, an error that is a bug shows its traceback

_INTERRUPTED = "interrupted; there is no answer"

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
                print_error(one_line(error, 10_000))
                raise click.exceptions.Exit(exit_code(error, refused)) from error

        return command  # type: ignore[return-value]  # the function, wrapped

    return decorate


def finish(run: Callable[[], object]) -> int:
    """Run a command to its end, whatever happens; return the exit code."""
    with _noting_interrupts() as interrupted:
        code = _run(run, interrupted)
        if interrupted and code not in (YES, INTERRUPTED):  # some package took it for an error of its own
            print_error(_INTERRUPTED)
            return INTERRUPTED
        return code


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Give a block the interrupts that come, which packages that are being imported may swallow."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(run: Callable[[], object], interrupted: list[int]) -> int:
    try:
        run()
        return YES
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo("\n".join(map(escaped, shown.getvalue().rstrip("\n").split("\n"))), err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stopped:
        print_error(str(stopped) or _INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:
        drop_output()
        return PIPE_CLOSED
    except SystemExit as error:  # ours end with click's Exit
        print_error(
            f"a package that was imported ended the process with sys.exit({error.code!r}), and there is no answer; "
            f"{DEBUG}=1 shows where"
        )
        _show_traceback()
    except OSError as error:
        if error.errno is None:  # of a package, not of the system
            return INTERNAL if interrupted else _bug(error)
        print_error(one_line(error))
        return UNREADABLE
    except MemoryError:
        print_error("there is not enough memory, and there is no answer")
    except Exception as error:  # the last resort
        return INTERNAL if interrupted else _bug(error)
    return INTERNAL


def _bug(error: Exception) -> int:
    print_error(
        f"{one_line(error)}. This is a bug in mergekit-select, report id {_report_id(error)}: please report this "
        f"id, the command and what `mergekit-select --version` prints; {DEBUG}=1 shows the traceback"
    )
    _show_traceback()
    return INTERNAL


def _show_traceback() -> None:
    if os.environ.get(DEBUG) == "1":
        click.echo(traceback.format_exc(), err=True)


def _report_id(error: BaseException) -> str:
    """Return a short digest of where an error was raised: the same for the same bug, without anything of the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.name}" for frame in frames]
    return hashlib.sha256("\n".join([type(error).__name__, *places]).encode()).hexdigest()[:8]
