"""The only mouth of the commands: reports as text or JSON, and progress bars.

Imports neither torch nor mergekit, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import click

from mergekit_select.errors import UnreadableError, escaped

if TYPE_CHECKING:
    from mergekit_select.provenance import Digests

SCHEMA_VERSION = 1


def print_report(command: str, data: Mapping[str, Any], lines: list[str], as_json: bool) -> None:
    """Print an answer to stdout: as lines of text, or as JSON in ASCII, with a schema version.

    Raises:
        UnreadableError: It cannot be written, such as to a full disk.
    """
    if as_json:
        lines = json.dumps(_plain({"schema": SCHEMA_VERSION, "command": command, **data}), indent=2).split("\n")
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


def _plain(value: Any) -> Any:
    """Return what JSON can hold: of objects their fields, and null for NaN and the infinities."""
    if dataclasses.is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def bar(what: str, unit: str, quiet: bool, items: Iterable[Any] | None = None) -> Any:
    """Return a tqdm bar on stderr, around items if there are any; silent if so wished, or if that is no terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]  # typed where types-tqdm is installed

    return tqdm(items, desc=what, unit=unit, disable=quiet or not sys.stderr.isatty())


@contextmanager
def counting(what: str, quiet: bool) -> Iterator[Digests]:
    """Give a block digests of files that are remembered afterwards, with a bar that counts what is hashed.

    huggingface_hub draws bars of its own only where ours are drawn, and what it logs becomes an error of ours or is
    tried again.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    from mergekit_select.provenance import Digests, default_store

    with bar(what, "B", quiet) as shown:
        shown.unit_scale = True
        digests = Digests(default_store(), shown.update)
        try:
            yield digests
        finally:
            digests.save()


def silence_libraries() -> None:
    """Keep mergekit and transformers from logging what a report says."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no types here
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger("mergekit").setLevel(logging.CRITICAL)
    logging.getLogger("mergekit_select").setLevel(logging.WARNING)
