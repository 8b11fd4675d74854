"""The command ``check``."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_select.cli._errors import NO, UNREADABLE, YES, one_line_errors
from mergekit_select.cli._options import merge_options, report_options, strict_option
from mergekit_select.cli._output import bar, print_report, silence_libraries
from mergekit_select.errors import escaped

if TYPE_CHECKING:
    from mergekit.options import MergeOptions


# Not readable=True, click's default: its message takes four lines.
@click.command("check", epilog="Example: mergekit-select check recipes/select.yml out/")
@click.argument("recipe", type=click.Path(readable=False))
@click.argument("out", type=click.Path(readable=False), required=False)
@report_options
@strict_option
@click.option("--clean", is_flag=True, help="Remove from OUT what a killed merge left; needs no RECIPE")
@merge_options(
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "transformers_cache",
    "lora_merge_cache",
    "lora_merge_dtype",
    "out_shard_size",
    "copy_tokenizer",
    "trust_remote_code",
    "write_model_card",
    "safe_serialization",
    "lazy_unpickle",
    "device",
)
@one_line_errors(refused=UNREADABLE)
def command(
    recipe: str, out: str | None, as_json: bool, strict: bool, clean: bool, quiet: bool, merge_options: MergeOptions
) -> None:
    """Would the merge of RECIPE into OUT work, before anything is downloaded or read?

    Reads config.json, tokenizer files, the recipe that a merge left, safetensors headers and indexes only. RECIPE may
    be of mergekit-multi.

    Exit codes: 0 it would (warnings allowed), 1 it would not, 2 RECIPE cannot be read.
    """
    removed: dict[str, list[str]] = {}
    if clean:
        from mergekit_select.check import remove_leftovers

        removed["removed"] = [str(path) for path in remove_leftovers(Path(out or recipe))]
    said = [f"removed {path}" for paths in removed.values() for path in paths]
    if clean and out is None:
        print_report("check", {"ok": True, **removed}, said, as_json)
        return
    # mergekit's imports make millions of objects that stay; looking for garbage among them takes a sixth of the time.
    gc.disable()
    from mergekit_select.check import check
    from mergekit_select.check.text import as_data, render

    gc.freeze()
    gc.enable()

    silence_libraries(quiet)
    with bar("Looking at models", " models", quiet) as shown:

        def progress(name: str) -> None:
            shown.set_postfix_str(escaped(name))
            shown.update()

        report = check(recipe, out, merge_options, progress)
    print_report("check", {**as_data(report), **removed}, [*said, *render(report)], as_json)
    raise click.exceptions.Exit(YES if report.passes(strict) else NO)
