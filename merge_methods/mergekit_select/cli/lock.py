"""The command ``lock``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_select.cli._errors import NO, UNREADABLE, YES, one_line_errors
from mergekit_select.cli._options import locked_options, map_option, report_options, strict_option
from mergekit_select.cli._output import counting, print_report

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

_EXAMPLES = """\b
Examples:
  mergekit-select lock recipes/select.yml
  mergekit-select lock recipes/select.yml --check
  mergekit-select lock recipes/select.yml --upgrade owner/name
"""


@click.command("lock", epilog=_EXAMPLES)
@click.argument("recipe", type=click.Path(readable=False))
@click.option("--out", type=click.Path(), metavar="FILE", help="The lock  [default: RECIPE with .lock.json at its end]")
@click.option("--pinned", type=click.Path(), metavar="FILE", help="Write the recipe with every hub model at its commit")
@click.option("--check", is_flag=True, help="Write nothing; say whether the lock is still true")
@click.option("--upgrade", multiple=True, metavar="MODEL", help="Let this model follow its branch; repeatable")
@map_option
@report_options
@strict_option
@locked_options
@one_line_errors(refused=UNREADABLE)
def command(
    merge_options: MergeOptions,
    recipe: str,
    out: str | None,
    pinned: str | None,
    check: bool,
    upgrade: tuple[str, ...],
    locations: dict[str, str],
    as_json: bool,
    quiet: bool,
    strict: bool,
) -> None:
    """From which bytes, exactly, would RECIPE be merged?

    Writes down the commit of every hub model, the digest of every file of every model, options and versions.
    Hub models are asked for metadata only, and stay at the commits of an earlier lock unless told to --upgrade.
    Local folders are hashed anew, and what has changed in them since an earlier lock is told.

    Exit codes: 0 locked, or still true; 1 not true any more; 2 usage, or something cannot be read.
    """
    from mergekit_select.findings import Severity
    from mergekit_select.provenance import locking, read_text
    from mergekit_select.provenance.documents import read_definition, write_document, write_text
    from mergekit_select.provenance.parents import parents_of

    text, path = read_text(recipe), Path(out or Path(recipe).with_suffix(".lock.json"))
    kept = read_definition(path) if check or os.path.exists(path) else None
    with counting("Hashing", quiet) as digests:
        now = locking.lock(
            text, recipe, merge_options, kept=kept, upgrade=upgrade, locations=locations, digests=digests
        )
    since = [] if check or kept is None else locking.stale(kept, now, recipe).of(Severity.ERROR)
    parents = parents_of(now.resolved_dependencies)
    findings = locking.notes(parents)
    if check and kept is not None:
        findings += locking.stale(kept, now, recipe)
    else:
        write_document(path, now)
    if pinned is not None:
        write_text(Path(pinned), locking.pinned(now, recipe))
    errors, warnings = findings.of(Severity.ERROR), findings.of(Severity.WARNING)
    models = [
        {"model": p.reference, "pinned": p.pinned, "licence": p.licence, "bytes": sum(f.size for f in p.files)}
        for p in parents
    ]
    changed = [f"{found.place}: {found.message}" for found in since]
    lines = [f"not as in the last lock: {change}" for change in changed]
    lines += [f"{m['pinned']}: {m['bytes']:,} bytes, licence {m['licence'] or 'not known'}" for m in models]
    verdict = f"STALE: {path}" if errors else f"{'TRUE' if check else 'LOCKED'}: {path}"
    data = {"ok": not errors, "lock": str(path), "models": models, "changed": changed}
    data["findings"] = [vars(found) for found in findings]
    print_report("lock", data, [*map(str, findings), *lines, verdict], as_json)
    raise click.exceptions.Exit(NO if errors or (strict and warnings) else YES)
