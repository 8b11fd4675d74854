"""The command ``verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mergekit_select.cli._errors import NO, UNREADABLE, YES, one_line_errors
from mergekit_select.cli._options import apply_threads, map_option, replay_options, report_options, strict_option
from mergekit_select.cli._output import bar, print_report

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

_EXAMPLES = """\b
Examples:
  mergekit-select verify out/
  mergekit-select verify out/ --map ./runs=/data/runs
"""


@click.command("verify", epilog=_EXAMPLES)
@click.argument("out", type=click.Path(readable=False))
@click.option("--recipe", type=click.Path(readable=False), help="Recipe, instead of OUT/mergekit_config.yml")
@map_option
@report_options
@strict_option
@replay_options
@one_line_errors(refused=UNREADABLE)
def command(
    merge_options: MergeOptions,
    out: str,
    recipe: str | None,
    locations: dict[str, str],
    strict: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Is the output in the folder OUT, bit for bit, what its recipe says?

    Derives every tensor again, one at a time, and compares bits, names, shapes and dtypes. Relative paths in
    the recipe begin at the current folder, as for mergekit-yaml.

    Exit codes: 0 the same, 1 not the same or unfinished, 2 usage, or something cannot be read.
    """
    from mergekit_select.findings import Severity
    from mergekit_select.verification import verify
    from mergekit_select.verification.text import as_data, render

    apply_threads(merge_options)
    answer = verify(
        out,
        recipe,
        locations=locations,
        options=merge_options,
        progress=lambda tensors: bar("Verifying", "tensor", quiet, tensors),
    )
    print_report("verify", as_data(answer), render(answer), as_json)
    warned = any(note.severity is Severity.WARNING for note in answer.notes)
    raise click.exceptions.Exit(YES if answer.same and not (strict and warned) else NO)
