"""The only mouth of the commands: reports as text or JSON, and progress bars.

Imports neither torch nor mergekit, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mergekit_select.errors import UnreadableError, escaped

if TYPE_CHECKING:
    from mergekit_select.inputs.digests import Digests

SCHEMA_VERSION = 1


def print_report(command: str, data: Mapping[str, Any], lines: list[str], as_json: bool) -> None:
    """Print an answer to stdout: as lines of text, or as JSON in ASCII, with a schema version.

    Raises:
        UnreadableError: It cannot be written, such as to a full disk.
    """
    if as_json:
        from pydantic_core import to_jsonable_python

        content = to_jsonable_python({"schema": SCHEMA_VERSION, "command": command, **data}, fallback=str)
        lines = json.dumps(_finite(content), indent=2, allow_nan=False).split("\n")
    try:
        click.echo("\n".join(map(escaped, lines)).encode("utf-8"))
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # `| head` has seen enough
    except OSError as error:
        drop_output()
        raise UnreadableError(f"cannot write the report to stdout: {error.strerror}") from error


def print_error(text: str) -> None:
    """Print one line to stderr."""
    with contextlib.suppress(OSError):  # nobody is left to hear it
        click.echo(escaped(f"Error: {text}").encode("utf-8"), err=True)


def drop_output() -> None:
    """Forget what stdout still holds: the interpreter would try to write it again when it exits, with a traceback."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test's own has no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _finite(value: Any) -> Any:
    """Return plain data with null for NaN and the infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bar(what: str, unit: str, quiet: bool, items: Iterable[Any] | None = None) -> Any:
    """Return a tqdm bar on stderr, around items if there are any; silent if so wished, or if that is no terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]  # typed where types-tqdm is installed

    return tqdm(items, desc=what, unit=unit, disable=not _drawn(quiet))


def hide_bars(quiet: bool) -> None:
    """Have huggingface_hub draw bars only where we draw some, and transformers, if it is loaded after this."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not _drawn(quiet):
        disable_progress_bars()


def _drawn(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


@contextmanager
def counting(what: str, quiet: bool) -> Iterator[Digests]:
    """Give a block digests of files that are remembered afterwards, with a bar that counts what is hashed.

    What huggingface_hub logs becomes an error of ours or is tried again.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    hide_bars(quiet)
    from mergekit_select.inputs.digests import Digests, default_store

    with bar(what, "B", quiet) as shown:
        shown.unit_scale = True
        digests = Digests(default_store(), shown.update)
        try:
            yield digests
        finally:
            digests.close()


def silence_libraries(quiet: bool) -> None:
    """Keep mergekit and transformers from logging what a report says, and from drawing bars where we draw none."""
    import transformers

    transformers_logging: Any = transformers.utils.logging  # transformers has no types here
    transformers_logging.set_verbosity_error()
    if not _drawn(quiet):
        transformers_logging.disable_progress_bar()  # and huggingface_hub's
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger("mergekit").setLevel(logging.CRITICAL)
    logging.getLogger("mergekit_select").setLevel(logging.WARNING)
