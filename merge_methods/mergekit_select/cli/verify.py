"""The command ``verify``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_select.cli._errors import NO, UNREADABLE, YES, one_line_errors
from mergekit_select.cli._options import (
    apply_threads,
    given_options,
    jobs_option,
    map_option,
    replay_options,
    report_options,
    strict_option,
    trust_options,
)
from mergekit_select.cli._output import bar, counting, print_report, silence_libraries

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_select.provenance.signing import Trust

_EXAMPLES = """\b
Examples:
  mergekit-select verify out/
  mergekit-select verify out/ --map ./runs=/data/runs
"""


@click.command("verify", epilog=_EXAMPLES)
@click.argument("out", type=click.Path(readable=False))
@click.option("--recipe", type=click.Path(readable=False), help="Recipe, instead of OUT/mergekit_config.yml")
@map_option
@click.option("--record", "recording", is_flag=True, help="Where OUT is the same, write down what it was made from")
@trust_options
@jobs_option
@report_options
@strict_option
@replay_options("copy_tokenizer")
@one_line_errors(refused=UNREADABLE)
def command(
    merge_options: MergeOptions,
    out: str,
    recipe: str | None,
    locations: dict[str, str],
    recording: bool,
    trust: Trust,
    jobs: int,
    strict: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Is the output in the folder OUT, bit for bit, what its recipe says?

    OUT may be a hub model, OWNER/NAME[@REVISION]. Where it has a record of its merge, its files are compared with
    that first, models are taken at the recorded commits, and options that are not given are the recorded ones. A
    signature, model.sig, is checked against the key or identity that is expected. Then derives every tensor again,
    one at a time, and compares bits, names, shapes and dtypes. Relative paths in the recipe begin at the current
    folder, as for mergekit-yaml.

    Exit codes: 0 the same, 1 not the same or unfinished, 2 usage, or something cannot be read.
    """
    from mergekit_select.errors import UnreadableError
    from mergekit_select.findings import Severity
    from mergekit_select.inputs.files import RECIPE
    from mergekit_select.provenance import (
        changed_inputs,
        compared,
        lock,
        obtained,
        of_output,
        read_record,
        read_text,
        record,
        require_unchanged,
    )
    from mergekit_select.provenance.signing import signature_findings
    from mergekit_select.verification import verify
    from mergekit_select.verification.text import as_data, render

    silence_libraries(quiet)
    apply_threads(merge_options)
    with counting("Hashing", quiet) as digests:
        folder = obtained(out, merge_options)
        if recording and not os.path.isdir(out):
            raise UnreadableError(
                f"--record writes into the folder of a merge, and {out} is a model on a hub; "
                f"download it with `hf download {out} --local-dir DIR`, and give DIR"
            )
        changed, locations, merge_options = compared(folder, recipe, locations, digests, merge_options, given_options())
        source, definition = Path(recipe or folder / RECIPE), None
        if recording and os.path.isfile(source):  # before the models are read: they may change meanwhile
            text = read_text(source)
            definition = lock(text, str(source), merge_options, locations=locations, digests=digests)
            definition = of_output(definition, folder, read_record(folder))
    signature = signature_findings(folder, trust)
    answer = verify(
        folder,
        recipe,
        locations=locations,
        options=merge_options,
        jobs=jobs,
        progress=lambda tensors: bar("Verifying", "tensor", quiet, tensors),
    )
    kept = None if answer.same or recipe is not None else read_record(folder)
    if kept is not None:  # the output may be what it was, and a model another
        with counting("Hashing", quiet) as digests:
            changed += changed_inputs(kept[0].definition, digests, locations)
    before = (*changed, *signature.of(Severity.ERROR))
    answer = replace(
        answer,
        problems=(*before, *answer.problems),
        notes=(*signature.of(Severity.WARNING), *answer.notes),
        undecided=answer.undecided and not before,
    )
    if definition is not None and answer.same:
        with counting("Hashing", quiet) as digests:
            require_unchanged(definition, digests, locations)
            record(folder, merge_options, definition, digests=digests)
    print_report("verify", as_data(answer), render(answer), as_json)
    warned = any(note.severity is Severity.WARNING for note in answer.notes)
    raise click.exceptions.Exit(YES if answer.same and not (strict and warned) else NO)
