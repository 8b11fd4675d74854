"""Merge from exactly the bytes that were resolved, with mergekit's own commands."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.graph import Executor
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import load_config, make_tasks

from mergekit_select.errors import PlanError, UnreadableError
from mergekit_select.findings import Findings, Severity, some
from mergekit_select.inputs.digests import Digests, folder_files
from mergekit_select.inputs.hub import hub_errors
from mergekit_select.inputs.recipe import read_text
from mergekit_select.inputs.references import references
from mergekit_select.planner.internals import isolated
from mergekit_select.provenance.documents import read_definition
from mergekit_select.provenance.locking import file_differences, lock, pinned, stale
from mergekit_select.provenance.parents import Parent, configurations, located, parents_of
from mergekit_select.provenance.statement import BuildDefinition


@contextmanager
def resolved(
    recipe: str, options: MergeOptions, digests: Digests, locked: Path | None = None
) -> Iterator[tuple[str, BuildDefinition]]:
    """Resolve a recipe, and give a block the path of one that names exactly what was found.

    Hub models are downloaded, as the merge would, and their bytes compared with what the hub says of them.

    Args:
        recipe: The recipe's path.
        options: As for the merge.
        digests: Remembers what was hashed.
        locked: A lock that all of it must agree with.

    Raises:
        UnreadableError: The recipe, the lock or a model cannot be read.
        PlanError: Something is not what the lock says, or what the hub says.
    """
    text = read_text(recipe)
    kept = None if locked is None else read_definition(locked)
    definition = lock(text, recipe, options, kept=kept, digests=digests)
    if kept is not None:
        require(stale(kept, definition, recipe), f"the lock {locked}")
    for parent in parents_of(definition.resolved_dependencies):
        require(downloaded_differences(parent, options, digests), "the hub's own list of files")
    exact = pinned(definition, recipe)
    if exact == text:
        yield recipe, definition
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(recipe).name)
        path.write_text(exact, "utf-8")
        yield str(path), definition


def require(findings: Findings, source: str) -> None:
    """Refuse to merge where there are errors.

    Raises:
        PlanError: With the first of them.
    """
    errors = findings.of(Severity.ERROR)
    if errors:
        said = [f"{found.place}: {found.message}, got {found.value or 'none'}" for found in errors]
        raise PlanError(f"the merge does not agree with {source}: {some(said)}; {errors[0].remedy}")


def require_unchanged(
    definition: BuildDefinition, digests: Digests, locations: Mapping[str, str] | None = None
) -> None:
    """Refuse to record a merge whose local models are not what they were before: nobody knows which bytes it read.

    Raises:
        UnreadableError: A file of theirs is another, or gone.
    """
    for found in changed_inputs(definition, digests, locations):
        raise UnreadableError(
            f"model {found.place} has changed while it was read, so nothing is recorded; merge into another folder"
        )


def changed_inputs(
    definition: BuildDefinition, digests: Digests, locations: Mapping[str, str] | None = None
) -> Findings:
    """Say which files of the local models of a merge are not what they were when it was made.

    Raises:
        UnreadableError: A model is not there.
    """
    found = Findings()
    moved = located(definition.recipe, "the recipe", locations or {})
    for parent in parents_of(definition.resolved_dependencies):
        if parent.commit is None:
            there = Path(moved.get(parent.reference, parent.path))
            found += file_differences(parent.reference, parent.files, folder_files(there, digests))
    return found


def require_opened(definition: BuildDefinition, files: Collection[str]) -> None:
    """Refuse a merge whose hub models were opened at other commits than those resolved.

    A model that is only read with an adapter is not opened here: the folder of the two is named after its commit.

    Args:
        definition: What was resolved.
        files: What was opened, in the snapshots of the hub's cache.

    Raises:
        PlanError: A branch has moved between the two.
    """
    opened = {part for file in files for part in Path(file).parts}
    merges = configurations(definition.recipe, "the recipe")
    plain = {str(model.model) for _, config in merges for _, model in references(config) if model.lora is None}
    for parent in parents_of(definition.resolved_dependencies):
        is_read = parent.reference in plain and {"base", "model"} & {*parent.roles}
        if parent.commit is not None and is_read and parent.commit not in opened:
            raise PlanError(f"model {parent.reference} has moved on the hub while it was opened; repeat the command")


def downloaded_differences(parent: Parent, options: MergeOptions, digests: Digests) -> Findings:
    """Download a hub model as mergekit would, and compare the bytes with those recorded; nothing for a local folder.

    Raises:
        UnusableModelError: The hub refuses it, or cannot be asked.
    """
    if parent.commit is None:
        return Findings()
    reference = ModelReference(model=ModelPath(path=parent.path, revision=parent.commit))
    with hub_errors():
        folder = Path(reference.local_path(cache_dir=options.transformers_cache, ignore_lora=True))
    return file_differences(parent.reference, parent.files, folder_files(folder, digests), partly=True)


def merge(text: str, place: str, out: Path, options: MergeOptions) -> None:
    """Merge a recipe into a folder, as mergekit-yaml or, for several merges, mergekit-multi does.

    Raises:
        PlanError: mergekit refuses the merge.
    """
    merges = configurations(text, place)
    if len(merges) > 1 and None not in dict(merges):
        raise PlanError(f"{place} must have a merge without a name, which is the one to make; make it anew")
    try:
        with isolated(options):
            if len(merges) == 1:
                run_merge(merges[0][1], str(out), options, config_source=text)
                return
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent) as stages:
                configs, needs = load_config(text, stages)
                tasks = make_tasks(configs, needs, options, stages, str(out), False)
                Executor(tasks, torch.device("cpu"), torch.device("cpu")).execute(desc="Merging models")
    except Exception as error:  # nobody lists what mergekit and below raise
        raise PlanError(f"merging {place}: {error}") from error
