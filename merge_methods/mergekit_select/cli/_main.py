"""The group of commands: which there are, where each lives, and the versions they run with."""

from __future__ import annotations

import importlib

import click

# Each command, and the module that defines it under the name ``command``.
_NAMES = ("check", "inspect", "verify", "merge", "lock", "reproduce", "run")
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
    """Look at a merge before and after: check a recipe, inspect what it selects, verify an output.

    Exit codes: 0 yes (warnings allowed), 1 the answer is no, 2 usage, or a file that cannot be read.
    """
