"""The command ``publish``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_select.cli._errors import NO, YES, one_line_errors
from mergekit_select.cli._options import apply_threads, given_options, map_option, replay_options, report_options
from mergekit_select.cli._output import bar, counting, print_report, silence_libraries

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_select.provenance import BuildDefinition

_EXAMPLES = """\b
Examples:
  mergekit-select publish out/ owner/name --dry-run
  mergekit-select publish out/ owner/name --public --licence apache-2.0
"""


@click.command("publish", epilog=_EXAMPLES)
@click.argument("out", type=click.Path(readable=False))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="For everybody to see; private otherwise")
@click.option("--allow-local", is_flag=True, help="Publish although others cannot get a local model of the recipe")
@click.option("--licence", metavar="ID", help="As the hub calls it  [default: that of all models, where it is one]")
@click.option("--evaluation", type=click.Path(), metavar="FILE", help="Evaluation results, as docs/sharing.md shows")
@click.option("--sign", is_flag=True, help="Sign with Sigstore, as whom you log in as; needs mergekit-select[sign]")
@click.option("--signing-key", type=click.Path(), metavar="FILE", help="Sign with this private key instead")
@click.option("--dry-run", is_flag=True, help="Write the card into OUT, and stop")
@map_option
@report_options
@replay_options("copy_tokenizer")
@one_line_errors(refused=NO)
def command(
    merge_options: MergeOptions,
    out: str,
    repository: str,
    public: bool,
    allow_local: bool,
    licence: str | None,
    evaluation: str | None,
    sign: bool,
    signing_key: str | None,
    dry_run: bool,
    locations: dict[str, str],
    as_json: bool,
    quiet: bool,
) -> None:
    """Put the merge in the folder OUT on a hub, with all that others need to make it again.

    Verifies OUT first, records what it was made from where that was not done, and writes README.md anew. Uploads to
    a pull request, compares the hub's bytes with these, and merges it. Log in with `hf auth login` before.

    Exit codes: 0 published, 1 refused, 2 usage, or something cannot be read or sent.
    """
    from mergekit_select.findings import Severity
    from mergekit_select.provenance import compared, lock, of_output, parents_of, read_record, read_text, record
    from mergekit_select.provenance.card import card, read_results
    from mergekit_select.provenance.documents import write_text
    from mergekit_select.provenance.publishing import common_licence, refusals, upload
    from mergekit_select.provenance.signing import signer
    from mergekit_select.verification import verify
    from mergekit_select.verification.text import as_data, render

    silence_libraries(quiet)
    apply_threads(merge_options)
    folder, results = Path(out), read_results(Path(evaluation)) if evaluation else []
    write_signature = signer(Path(signing_key) if signing_key else None) if sign or signing_key else None
    with counting("Hashing", quiet) as digests:
        changed, locations, merge_options = compared(folder, None, locations, digests, merge_options, given_options())
        answer = verify(
            folder,
            locations=locations,
            options=merge_options,
            progress=lambda tensors: bar("Verifying", "tensor", quiet, tensors),
        )
        if changed or not answer.same or answer.recipe is None:
            lines = [*map(str, changed), *render(answer)]
            print_report("publish", {**as_data(answer), "ok": False}, lines, as_json)
            raise click.exceptions.Exit(NO)
        kept = read_record(folder)
        if kept is None:
            text = read_text(answer.recipe)
            definition = lock(text, out, merge_options, locations=locations, digests=digests)
            record(folder, merge_options, of_output(definition, folder, None))
            kept = read_record(folder)
        assert kept is not None
        definition = kept[0].definition
        parents = parents_of(definition.resolved_dependencies)
        findings, commit = refusals(folder, parents, allow_local, write_signature is not None), None
        refused = bool(findings.of(Severity.ERROR))
        if not refused:
            table, picture = _inspected(folder, definition, locations, merge_options, quiet)
            named = licence or common_licence(parents)
            write_text(folder / "README.md", card(repository, kept[0], parents, named, table, picture, results))
            if write_signature is not None:
                write_signature(folder)
            if not dry_run:
                say = None if quiet else lambda line: click.echo(line, err=True)
                commit = upload(folder, repository, not public, digests, say or (lambda _: None))
    wrote = f"WROTE: {folder / 'README.md'}"
    verdict = f"REFUSED: {out}" if refused else wrote if commit is None else f"{repository}@{commit}"
    data = {"ok": not refused, "commit": commit, "findings": [vars(found) for found in findings]}
    print_report("publish", data, [*map(str, findings), verdict], as_json)
    raise click.exceptions.Exit(NO if refused else YES)


def _inspected(
    folder: Path, definition: BuildDefinition, locations: dict[str, str], options: MergeOptions, quiet: bool
) -> tuple[str | None, bool]:
    """Return what ``inspect`` says, and whether it could be drawn; nothing of a recipe of several merges."""
    from mergekit_select.errors import UnreadableError
    from mergekit_select.inspection import inspect, plot
    from mergekit_select.inspection.tables import render
    from mergekit_select.provenance import configuration
    from mergekit_select.provenance.recording import PICTURE

    config = configuration(definition, str(folder), locations)
    if config is None:
        return None, False
    inspected = inspect(config, options=options, progress=lambda tensors: bar("Inspecting", "tensor", quiet, tensors))
    try:
        plot.require(folder / PICTURE)
    except UnreadableError:  # without matplotlib, the card has the table alone
        return "\n".join(render(inspected)), False
    plot.draw(inspected, folder / PICTURE)
    return "\n".join(render(inspected)), True
