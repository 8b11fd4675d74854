"""The command ``reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_select.cli._errors import NO, YES, one_line_errors
from mergekit_select.cli._options import apply_threads, map_option, merge_options, report_options
from mergekit_select.cli._output import bar, counting, print_report, silence_libraries

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_select.provenance.reproducing import Reproduction

_SHOWN = 20  # tensors that are listed one by one
_EXAMPLES = """\b
Examples:
  mergekit-select reproduce owner/name --dry-run
  mergekit-select reproduce owner/name@main
  mergekit-select reproduce select.lock.json out/
"""


@click.command("reproduce", epilog=_EXAMPLES)
@click.argument("model")
@click.argument("out", type=click.Path(), required=False)
@click.option("--dry-run", is_flag=True, help="Say what it would take and what is in the way, and stop")
@map_option
@report_options
@merge_options("transformers_cache", "lora_merge_cache", "device", "num_threads", "lazy_unpickle", "read_to_gpu")
@one_line_errors(refused=NO)
def command(
    merge_options: MergeOptions,
    model: str,
    out: str | None,
    dry_run: bool,
    locations: dict[str, str],
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a published merge again, and say whether it is the same, tensor by tensor.

    MODEL is a hub model OWNER/NAME[@REVISION], the folder of a merge, or a lock. Its models are downloaded at the
    recorded commits and compared with the recorded digests. Without OUT, no tensor is written. No code from a hub
    is run.

    Exit codes: 0 the same (made, for a lock; possible, for --dry-run), 1 not the same, undecided or not possible,
    2 usage, or something cannot be read.
    """
    from mergekit_select.provenance.reproducing import reproduce

    silence_libraries(quiet)
    apply_threads(merge_options)
    with counting("Hashing", quiet) as digests:
        answer = reproduce(
            model,
            None if out is None else Path(out),
            merge_options,
            locations=locations,
            dry_run=dry_run,
            digests=digests,
            progress=lambda tensors: bar("Merging", "tensor", quiet, tensors),
        )
    ok = answer.verdict in ("same", "made", "possible")
    data = {"ok": ok, **vars(answer), "needs": vars(answer.needs), "findings": [vars(f) for f in answer.findings]}
    print_report("reproduce", data, _render(answer), as_json)
    raise click.exceptions.Exit(YES if ok else NO)


def _render(answer: Reproduction) -> list[str]:
    needs = answer.needs
    written = "an unknown number" if needs.written is None else f"{needs.written:,}"
    lines = [*map(str, answer.findings), *answer.differing[:_SHOWN]]
    if len(answer.differing) > _SHOWN:
        lines.append(f"and {len(answer.differing) - _SHOWN} more; --json lists all")
    lines.append(f"needs: {needs.download:,} bytes to download, {needs.read:,} to read, {written} to write; "
                 f"about {needs.seconds / 60:.0f} min at 50 MB/s from the network and 300 MB/s of disk")  # fmt: skip
    if answer.verdict in ("same", "not same", "undecided"):
        differ = f"{len(answer.differing):,} of {answer.tensors:,} tensors differ"
        told = f"all {answer.tensors:,} tensors have the digests of" if answer.verdict == "same" else f"{differ} from"
        lines.append(f"{answer.verdict.upper()}: {told} {answer.target}")
    else:
        lines.append(f"{answer.verdict.upper()}: {answer.target}")
    return lines
