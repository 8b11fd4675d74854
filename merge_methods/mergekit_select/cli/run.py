"""``mergekit-select run``: mergekit's own commands with the merge methods registered first."""

from __future__ import annotations

import copy
import datetime
import importlib
from pathlib import Path
from typing import Any

import click

from mergekit_select.cli._errors import NO, one_line_errors
from mergekit_select.cli._output import counting

_STOCK = {
    "yaml": ("mergekit.scripts.run_yaml", "mergekit-yaml"),
    "multi": ("mergekit.scripts.multimerge", "mergekit-multi"),
    "pytorch": ("mergekit.scripts.merge_raw_pytorch", "mergekit-pytorch"),
}
_OWN = (
    click.Option(["--locked"], metavar="LOCK", help="Refuse to merge from anything that LOCK does not say"),
    click.Option(["--provenance/--no-provenance"], default=True, help="Record what the merge was made from"),
)


@click.group("run", epilog="Example: mergekit-select run yaml recipes/select.yml out/ --cuda")
def command() -> None:
    """Run mergekit-yaml, mergekit-multi or mergekit-pytorch with the methods registered.

    For where the startup file does not run (python -S, pip install --target). All arguments go to the stock command.
    `run yaml` also writes merge_provenance.json and merge_tensors.json, and takes --locked LOCK.
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
        if name == "yaml":
            _merge_and_record(main, ctx.command_path, [*args])
        else:
            main.main(args=list(args), prog_name=ctx.command_path)


@one_line_errors(refused=NO)
def _merge_and_record(main: click.Command, program: str, args: list[str]) -> None:
    """Run mergekit-yaml on a recipe whose models are at the commits that are recorded."""
    own = copy.copy(main)
    own.params = [*main.params, *_OWN]
    with own.make_context(program, args) as ctx:
        locked, wanted = ctx.params.pop("locked"), ctx.params.pop("provenance")
        known = {"config_file", "out_path"} <= ctx.params.keys()  # a later mergekit-yaml may call them otherwise
        if not (known and (wanted or locked)):
            own.invoke(ctx)
            return
        from mergekit.options import MergeOptions

        from mergekit_select.provenance import merging, record

        given: dict[str, Any] = {key: value for key, value in ctx.params.items() if key in MergeOptions.model_fields}
        options, out = MergeOptions(**given), Path(ctx.params["out_path"])
        started = datetime.datetime.now(datetime.timezone.utc)
        with counting("Hashing", options.quiet) as digests:
            lock = None if locked is None else Path(locked)
            with merging.resolved(ctx.params["config_file"], options, digests, lock) as (path, definition):
                ctx.params["config_file"] = path
                own.invoke(ctx)
            merging.require_unchanged(definition, digests)
            record(out, options, definition, started=started, digests=digests)


for _name, (_module, _command) in _STOCK.items():
    _add(_name, _module, _command)
