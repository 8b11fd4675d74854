"""A mergekit-multi file: each of its merges is recorded as soon as it is made, with all that it is made from."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_select.errors import PlanError, UnreadableError
from mergekit_select.findings import Severity, some
from mergekit_select.inputs.digests import Digests
from mergekit_select.inputs.recipe import parse_recipes, validated
from mergekit_select.inputs.references import references
from mergekit_select.planner.internals import merging_stages_by
from mergekit_select.provenance.locking import define, stale
from mergekit_select.provenance.merging import require_unchanged
from mergekit_select.provenance.parents import parents_of, roles_of
from mergekit_select.provenance.recording import changes, read_record, record
from mergekit_select.provenance.statement import BuildDefinition


@contextmanager
def recording(
    definition: BuildDefinition,
    place: str,
    folders: Mapping[str | None, Path],
    options: MergeOptions,
    digests: Digests,
    *,
    lazy: bool,
    locked: bool,
    say: Callable[[str], object],
) -> Iterator[None]:
    """Record the merges that mergekit-multi makes in a block.

    Args:
        definition: What the whole file is made from.
        place: What messages call it.
        folders: Where each merge goes, by name.
        options: Those of the merges.
        digests: Remembers what was hashed.
        lazy: Whether mergekit-multi leaves merges as they are whose folders are there.
        locked: Whether such a folder must be of this file.
        say: Told what is not recorded.

    Raises:
        PlanError: A folder is there already and must be of this file, and no record says so.
        UnreadableError: A local model has changed since it was looked up.
    """
    definitions = {
        recipe.name: of_stage(definition, place, recipe.name) for recipe in parse_recipes(definition.recipe, place)
    }
    names = {os.path.abspath(folder): name for name, folder in folders.items()}
    there = [name for name, folder in folders.items() if lazy and os.path.exists(folder / "config.json")]
    others = {name for name in there if not _is(folders[name], definitions[name], place, digests)}
    told = f"no record says that {some(sorted(str(folders[name]) for name in others))} is of this file"
    if others and locked:
        raise PlanError(f"{told}; remove it, or give --no-lazy")

    def merge_and_record(config: Any, out_path: str, *more: Any, **named: Any) -> None:
        started = datetime.datetime.now(datetime.timezone.utc)
        run_merge(config, out_path, *more, **named)
        name = names[os.path.abspath(out_path)]
        others.discard(name)
        used = {recipe.name for recipe in parse_recipes(definitions[name].recipe, place)} - {None}
        if others & used:
            say(f"{out_path} is not recorded: {told}; --no-lazy merges all anew")
        else:
            require_unchanged(definitions[name], digests)
            record(Path(out_path), options, definitions[name], started=started, digests=digests)

    with merging_stages_by(merge_and_record):
        yield


def folders(definition: BuildDefinition, place: str, intermediate: str, out: str | None) -> dict[str | None, Path]:
    """Return where mergekit-multi writes each merge; without ``out``, the one without a name nowhere."""
    names = (recipe.name for recipe in parse_recipes(definition.recipe, place))
    places = {name: out if name is None else os.path.join(intermediate, name) for name in names}
    return {name: Path(place) for name, place in places.items() if place}


def of_stage(definition: BuildDefinition, place: str, name: str | None) -> BuildDefinition:
    """Return what one merge of a mergekit-multi file is made from: models, by its own recipe and those it needs.

    Args:
        definition: Of the whole file.
        place: What messages call it.
        name: The merge; None for the one without a name, which is made by the whole file.
    """
    if name is None:
        return definition
    recipes = {recipe.name: recipe for recipe in parse_recipes(definition.recipe, place)}
    wanted = [name]
    for needed in wanted:  # grows
        used = (reference.model.path for _, reference in references(validated(recipes[needed], place)))
        wanted += dict.fromkeys(path for path in used if path in recipes and path not in wanted)
    documents = [({} if each == name else {"name": each}) | recipes[each].raw for each in reversed(wanted)]
    text = yaml.safe_dump_all(documents, sort_keys=False)
    roles = roles_of(text, place)
    parents = [
        replace(parent, roles=tuple(sorted(roles[parent.reference])))
        for parent in parents_of(definition.resolved_dependencies)
        if parent.reference in roles
    ]
    return define(text, place, definition.external_parameters.options, parents)


def _is(folder: Path, definition: BuildDefinition, place: str, digests: Digests) -> bool:
    """Whether a folder's record says that it was made from this, and the folder still is what was recorded."""
    try:
        kept = read_record(folder)
    except UnreadableError:
        return False
    return (
        kept is not None
        and not stale(kept[0].definition, definition, place).of(Severity.ERROR)
        and not changes(folder, kept[0], digests)
    )
