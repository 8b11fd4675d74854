"""The command ``check``: arguments in, findings out."""

from __future__ import annotations

import gc
import json
import logging
import sys
from typing import TYPE_CHECKING

import click

from mergekit_select.cli_options import merge_options as merge_option_set
from mergekit_select.cli_options import report_options
from mergekit_select.replay_cli import print_text

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_select.findings import Cost, Report


@click.command("check", epilog="Example: mergekit-select check recipes/select.yml out/")
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path(), required=False)
@report_options
@merge_option_set(
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
@click.pass_context
def check_command(
    ctx: click.Context,
    recipe: str,
    out: str | None,
    as_json: bool,
    strict: bool,
    quiet: bool,
    merge_options: MergeOptions,
) -> None:
    """Would the merge of RECIPE into OUT work, before anything is downloaded or read?

    Reads config.json, tokenizer files, safetensors headers and indexes only. RECIPE may be of mergekit-multi.

    Exit codes: 0 it would (warnings allowed), 1 it would not, 2 RECIPE cannot be read.
    """
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]  # typed where types-tqdm is installed

    # mergekit's imports make millions of objects that stay; looking for garbage among them takes a sixth of the time.
    gc.disable()
    from mergekit_select.check import check

    gc.freeze()
    gc.enable()

    _silence_libraries()
    with tqdm(desc="Looking at models", unit=" models", disable=quiet or not sys.stderr.isatty()) as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        report = check(recipe, out, merge_options, progress)
    if as_json:
        print_text(json.dumps(report.as_json(), indent=2))
    else:
        print_text(render(report))
    ctx.exit(0 if report.passes(strict) else 1)


def render(report: Report) -> str:
    """Return the report as text, a finding a line."""
    from mergekit_select.findings import Severity

    order = {severity: rank for rank, severity in enumerate(Severity)}
    lines = [str(finding) for finding in sorted(report.findings, key=lambda finding: order[finding.severity])]
    lines += [_cost(cost) for cost in report.costs]
    counts = [_count(len(report.of(severity)), severity.value) for severity in Severity]
    verdict = "this merge would work" if report.passes() else "this merge would not work"
    if report.passes() and any(finding.kind == "not-known" for finding in report.findings):
        verdict += ", as far as can be known"
    return "\n".join([*lines, f"{verdict}: {', '.join(counts)}"])


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _cost(cost: Cost) -> str:
    from mergekit_select.check_output import size

    name = f"{cost.merge}: " if cost.merge else ""
    free = "" if cost.bytes_free is None else f" ({size(cost.bytes_free)} free)"
    if cost.peak_memory is None:
        return f"{name}nothing would be written"
    least = f", at least, since {cost.unknown} have an unknown size" if cost.unknown else ""
    return (
        f"{name}reads {size(cost.bytes_read)}, writes {cost.tensors} tensors, {size(cost.bytes_written)}{free}; "
        f"peak memory about {size(cost.peak_memory)}, at {cost.peak_tensor}{least}"
    )


def _silence_libraries() -> None:
    """Keep mergekit and transformers from logging what the report says."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no types here
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger("mergekit").setLevel(logging.CRITICAL)
    logging.getLogger("mergekit_select").setLevel(logging.WARNING)
