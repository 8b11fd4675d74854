"""The command ``inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_select.cli._errors import NO, one_line_errors
from mergekit_select.cli._options import apply_threads, jobs_option, replay_options, report_options
from mergekit_select.cli._output import bar, print_report, silence_libraries

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

_EXAMPLES = """\b
Examples:
  mergekit-select inspect recipes/select.yml
  mergekit-select inspect recipes/select.yml --plot selected.png
"""


@click.command("inspect", epilog=_EXAMPLES)
@click.argument("recipe", type=click.Path(readable=False))
@click.option("--plot", type=click.Path(), metavar="FILE", help="Draw layers against modules: .png, .svg or .pdf")
@jobs_option
@report_options
@replay_options()
@one_line_errors(refused=NO)
def command(merge_options: MergeOptions, recipe: str, plot: str | None, jobs: int, as_json: bool, quiet: bool) -> None:
    """What would be selected from where, if RECIPE were merged?

    Reads the models once and tells, per sub-model, the share of parameters unchanged from the base, drawn
    first, redrawn by resampling and chosen in the end, and what is left at the base; how far the sub-models
    agree; the norms of their task vectors; in total, by layer and by kind of module. The draws are the merge's
    own. For a recipe of another method, the models are compared.

    Exit codes: 0 done, 1 the recipe cannot be merged, 2 usage, or something cannot be read or written.
    """
    from mergekit_select.inspection import inspect
    from mergekit_select.inspection import plot as picture
    from mergekit_select.inspection.tables import as_data, render

    if plot is not None:
        picture.require(Path(plot))
    silence_libraries(quiet)
    apply_threads(merge_options)
    answer = inspect(
        recipe, options=merge_options, jobs=jobs, progress=lambda tensors: bar("Inspecting", "tensor", quiet, tensors)
    )
    if plot is not None:
        picture.draw(answer, Path(plot))
    print_report("inspect", {"recipe": recipe, "ok": True, **as_data(answer)}, render(answer), as_json)
