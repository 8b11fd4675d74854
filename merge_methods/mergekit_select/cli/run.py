"""``mergekit-select run``: mergekit's own commands with the merge methods registered first."""

from __future__ import annotations

import copy
import datetime
import importlib
from contextlib import ExitStack
from pathlib import Path

import click

from mergekit_select.cli._errors import NO, one_line_errors
from mergekit_select.cli._output import counting

_STOCK = {
    "yaml": ("mergekit.scripts.run_yaml", "mergekit-yaml"),
    "multi": ("mergekit.scripts.multimerge", "mergekit-multi"),
    "pytorch": ("mergekit.scripts.merge_raw_pytorch", "mergekit-pytorch"),
}
# Of those that write down what they made, the parameters that this needs.
_PARAMETERS = {"yaml": {"config_file", "out_path"}, "multi": {"config_file", "out_path", "intermediate_dir", "lazy"}}
_OWN = (
    click.Option(["--locked"], metavar="LOCK", help="Refuse to merge from anything that LOCK does not say"),
    click.Option(["--provenance/--no-provenance"], default=True, help="Record what the merge was made from"),
)


@click.group("run", epilog="Example: mergekit-select run yaml recipes/select.yml out/ --cuda")
def command() -> None:
    """Run mergekit-yaml, mergekit-multi or mergekit-pytorch with the methods registered.

    For where the startup file does not run (python -S, pip install --target). All arguments go to the stock command.
    `run yaml` and `run multi` also write merge_provenance.json and merge_tensors.json into the folder of each merge,
    and take --locked LOCK and --no-provenance.
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
        if name in _PARAMETERS:
            _merge_and_record(name, main, ctx.command_path, [*args])
        else:
            main.main(args=list(args), prog_name=ctx.command_path)


@one_line_errors(refused=NO)
def _merge_and_record(name: str, main: click.Command, program: str, args: list[str]) -> None:
    """Run mergekit-yaml or mergekit-multi on a recipe whose models are at the commits that are recorded."""
    own = copy.copy(main)
    own.params = [*main.params, *_OWN]
    with own.make_context(program, args) as ctx:
        locked, wanted, given = ctx.params.pop("locked"), ctx.params.pop("provenance"), ctx.params
        known = _PARAMETERS[name] <= given.keys()  # a later mergekit may call them otherwise
        if not (known and (wanted or locked)):
            own.invoke(ctx)
            return
        from mergekit.options import MergeOptions

        from mergekit_select.provenance import merging, record, stages

        options = MergeOptions(**{key: value for key, value in given.items() if key in MergeOptions.model_fields})
        recipe, started = given["config_file"], datetime.datetime.now(datetime.timezone.utc)
        with ExitStack() as stack:
            digests = stack.enter_context(counting("Hashing", options.quiet))
            lock = None if locked is None else Path(locked)
            path, definition = stack.enter_context(merging.resolved(recipe, options, digests, lock))
            given["config_file"] = path
            if name == "multi":
                folders = stages.folders(definition, recipe, given["intermediate_dir"], given["out_path"])
                stack.enter_context(
                    stages.recording(
                        definition,
                        recipe,
                        folders,
                        options,
                        digests,
                        lazy=given["lazy"],
                        locked=lock is not None,
                        say=lambda line: click.echo(line, err=True),
                    )
                )
            own.invoke(ctx)
            if name == "yaml":
                merging.require_unchanged(definition, digests)
                record(Path(given["out_path"]), options, definition, started=started, digests=digests)


for _name, (_module, _command) in _STOCK.items():
    _add(_name, _module, _command)
