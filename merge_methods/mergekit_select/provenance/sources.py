"""A merge that is to be looked at: a folder, or a model on a hub, with or without a record."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from mergekit.options import MergeOptions

from mergekit_select.errors import UnreadableError
from mergekit_select.findings import Findings
from mergekit_select.inputs.digests import Digests
from mergekit_select.inputs.files import RECIPE
from mergekit_select.inputs.hub import hub_errors, is_hub_id
from mergekit_select.provenance.locking import recorded_options
from mergekit_select.provenance.recording import changes, pins, read_record


def obtained(out: str, options: MergeOptions, patterns: list[str] | None = None) -> Path:
    """Return the folder of a merge; one on a hub is downloaded into the cache.

    Args:
        out: A folder, or OWNER/NAME[@REVISION].
        options: For where the cache is.
        patterns: What to download; None for everything.

    Raises:
        UnreadableError: There is no such thing, or the hub refuses it.
    """
    repository, _, revision = out.partition("@")
    if os.path.exists(out) or "/" not in repository or out.startswith((".", "/", "~")) or not is_hub_id(repository):
        return Path(out)
    cache = options.transformers_cache
    try:
        with hub_errors():
            return Path(
                snapshot_download(repository, revision=revision or None, cache_dir=cache, allow_patterns=patterns)
            )
    except UnreadableError as error:
        raise UnreadableError(f"model {out}: {error}") from error


def compared(
    folder: Path,
    recipe: str | None,
    locations: Mapping[str, str],
    digests: Digests,
    options: MergeOptions,
    given: Collection[str],
) -> tuple[Findings, dict[str, str], MergeOptions]:
    """Compare a folder with its record, where it has one.

    Args:
        folder: The folder.
        recipe: Its recipe, where it is not in it.
        locations: Where models of the recipe lie now; these go before what is recorded.
        digests: Remembers what was hashed.
        options: As for the merge, where they are not recorded.
        given: Names of options that stay whatever is recorded.

    Returns:
        What is not as recorded, where the models of its recipe are to be taken from, and the merge's options.

    Raises:
        UnreadableError: The record breaks a rule of its format.
    """
    kept = read_record(folder)
    if kept is None:
        return Findings(), dict(locations), options
    statement = kept[0]
    places = pins(Path(recipe or folder / RECIPE), statement, locations)
    return changes(folder, statement, digests), places, recorded_options(statement.definition, options, given)
