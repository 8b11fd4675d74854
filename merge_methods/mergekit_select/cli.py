"""The command ``mergekit-select``: arguments in, findings out.

The commands are imported when they are called, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import click

from mergekit_select.errors import MergekitSelectError

EXIT_UNREADABLE = 2

_COMMANDS = {
    "check": "mergekit_select.check_cli:check_command",
    "inspect": "mergekit_select.inspection_cli:inspect_command",
    "verify": "mergekit_select.verification_cli:verify_command",
    "run": "mergekit_select.run_cli:run_group",
}


class _Unreadable(click.ClickException):
    """One line on stderr, and the exit code for what cannot be read."""

    exit_code = EXIT_UNREADABLE


class _LazyGroup(click.Group):
    """A group that imports a command when it is named, and turns the errors of this package into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, place in _COMMANDS.items() if importlib.util.find_spec(place.partition(":")[0])]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module, _, attribute = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MergekitSelectError as error:
            if ctx.invoked_subcommand == "run":  # whose errors are those of the stock command
                raise
            raise _Unreadable(" ".join(str(error).split())) from error


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    from mergekit_select import __version__
    from mergekit_select.selection import draws

    click.echo(
        f"mergekit-select {__version__}\nmergekit {version('mergekit')}\ntorch {version('torch')}\n"
        f"draws {draws.VERSION}"
    )
    ctx.exit()


_EXAMPLES = """\b
Examples:
  mergekit-select check recipes/select.yml out/
  mergekit-select inspect recipes/select.yml
  mergekit-select verify out/
"""


@click.group("mergekit-select", cls=_LazyGroup, epilog=_EXAMPLES)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of mergekit-select, mergekit, torch and the draws, and exit.",
)
def main() -> None:
    """Look at a merge before and after: check a recipe, inspect what it selects, verify an output.

    Exit codes: 0 yes (warnings allowed), 1 the answer is no, 2 usage, or a file that cannot be read.
    """


if __name__ == "__main__":
    main()
