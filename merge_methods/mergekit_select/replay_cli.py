"""What the commands that replay a merge share: mergekit's options, progress, output and exit codes.

Imports neither torch nor mergekit, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from mergekit_select.cli_options import merge_options
from mergekit_select.errors import MergekitSelectError

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

SCHEMA_VERSION = 1
YES, NO, UNREADABLE = 0, 1, 2

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Item = TypeVar("_Item")


def replay_options(function: _Command) -> _Command:
    """Give a command ``--json``, ``--quiet`` and those of mergekit-yaml's options that change a tensor.

    It receives ``as_json``, ``quiet`` and ``merge_options``, a MergeOptions.
    """
    decorated: Any = merge_options(
        "allow_crimes",
        "unsafe_truncate_embeddings",
        "transformers_cache",
        "lora_merge_cache",
        "lora_merge_dtype",
        "trust_remote_code",
        "lazy_unpickle",
        "device",
        "read_to_gpu",
        "random_seed",
        "num_threads",
    )(function)
    decorated = click.option("--quiet", is_flag=True, help="No progress bar")(decorated)
    text = "Print the report as JSON, with a schema version"
    return click.option("--json", "as_json", is_flag=True, help=text)(decorated)  # type: ignore[no-any-return]


def apply_threads(options: MergeOptions) -> None:
    """Let torch use as many threads as asked for; mergekit's own step fails where torch has computed."""
    if options.num_threads is not None:
        import torch

        torch.set_num_threads(options.num_threads)


def progress_bar(what: str, quiet: bool) -> Callable[[Iterable[_Item]], Iterator[_Item]]:
    """Return what wraps an iterable in a progress bar on stderr, if that is a terminal and wants one."""
    import tqdm  # type: ignore[import-untyped, unused-ignore]  # typed where types-tqdm is installed

    def wrap(items: Iterable[_Item]) -> Iterator[_Item]:
        yield from tqdm.tqdm(items, desc=what, unit="tensor", disable=quiet or not sys.stderr.isatty())

    return wrap


@contextmanager
def one_line_errors(refused: int) -> Iterator[None]:
    """Print an error of ours as one line and exit: 2 where something cannot be read, else ``refused``."""
    from mergekit_select.replay import UnreadableError

    try:
        yield
    except MergekitSelectError as error:
        fail(str(error), UNREADABLE if isinstance(error, UnreadableError) else refused)


def fail(message: str, code: int) -> NoReturn:
    """Print one line to stderr and exit."""
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(code)


def print_text(text: str) -> None:
    """Print to stdout; where that fails, such as on a full disk, say so in one line and exit with 2."""
    try:
        click.echo(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # `| head` has seen enough: click's own handling
    except OSError as error:
        # What is left in the buffer would be tried again when the interpreter exits, with a traceback.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        fail(f"cannot write the report to stdout: {error.strerror}", UNREADABLE)


def print_json(command: str, answer: dict[str, Any]) -> None:
    """Print an answer as JSON under the schema's version."""
    content = {"schema": SCHEMA_VERSION, "command": command, **plain(answer)}
    print_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """Return a value as what JSON has: dataclasses as objects, NaN and the infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
