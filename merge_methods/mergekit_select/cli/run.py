"""``mergekit-select run``: mergekit's own commands with the merge methods registered first."""

from __future__ import annotations

import importlib

import click

_STOCK = {
    "yaml": ("mergekit.scripts.run_yaml", "mergekit-yaml"),
    "multi": ("mergekit.scripts.multimerge", "mergekit-multi"),
    "pytorch": ("mergekit.scripts.merge_raw_pytorch", "mergekit-pytorch"),
}


@click.group("run", epilog="Example: mergekit-select run yaml recipes/select.yml out/ --cuda")
def command() -> None:
    """Run mergekit-yaml, mergekit-multi or mergekit-pytorch with the methods registered.

    For where the startup file does not run (python -S, pip install --target). All arguments go to the stock command;
    nothing else differs.
    """


def _add(name: str, module: str, stock: str) -> None:
    # The stock command reads all arguments, --help included.
    @command.command(
        name,
        help=f"Run {stock} ARGS…; `--help` is that of {stock}.",
        short_help=f"Run {stock} with the methods registered.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("args", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def stock_command(ctx: click.Context, args: tuple[str, ...]) -> None:
        import mergekit_select.methods  # noqa: F401  # registers the methods

        main: click.Command = importlib.import_module(module).main
        main.main(args=list(args), prog_name=ctx.command_path)


for _name, (_module, _command) in _STOCK.items():
    _add(_name, _module, _command)
