"""The group of commands: which there are, where each lives, and the versions they run with."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from mergekit_select.cli._errors import finish

# Each command, and the module that defines it under the name ``command``.
_NAMES = ("check", "inspect", "verify", "merge", "lock", "reproduce", "publish", "run", "recipes")
_COMMANDS = {name: f"mergekit_select.cli.{name}" for name in _NAMES}

_EXAMPLES = """\b
Examples:
  mergekit-select check recipes/select.yml out/
  mergekit-select inspect recipes/select.yml
  mergekit-select verify out/
"""


class _LazyGroup(click.Group):
    """A group that imports a command when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name]).command
        return command

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Run a command and exit; whatever happens, by a code of ``_errors``.

        ``run`` is left to click and to the stock command, as is the completion of shells.
        """
        given = [*sys.argv[1:]] if args is None else [*args]
        if given[:1] == ["run"] or "_MERGEKIT_SELECT_COMPLETE" in os.environ or options.get("standalone_mode") is False:
            return super().main(given, *more, **options)
        sys.exit(finish(lambda: self._run(given)))

    def _run(self, args: list[str]) -> None:
        with self.make_context("mergekit-select", args) as context:
            self.invoke(context)


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    from mergekit_select import __version__
    from mergekit_select.selection import draws, kernel_name

    click.echo(
        f"mergekit-select {__version__}\nmergekit {version('mergekit')}\ntorch {version('torch')}\n"
        f"draws {draws.VERSION}\nkernel {kernel_name()}"
    )
    ctx.exit()


@click.group("mergekit-select", cls=_LazyGroup, epilog=_EXAMPLES)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of mergekit-select, mergekit, torch and the draws, and the kernel in use.",
)
def main() -> None:
    """Look at a merge before and after: check a recipe, inspect what it selects, verify an output, share it.

    Exit codes: 0 yes (warnings allowed), 1 the answer is no, 2 usage, or a file that cannot be read; 70 a bug, 130
    interrupted, 141 nobody reads the output: there is no answer.
    """
