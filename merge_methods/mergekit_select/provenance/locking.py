"""Which bytes is a merge made from? Resolves a recipe to a build definition, and compares one with what is there."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_select import kinds
from mergekit_select.errors import RecipeError, UnreadableError, one_line
from mergekit_select.findings import Findings, UnusableModelError
from mergekit_select.inputs.digests import Digests, File
from mergekit_select.inputs.hub import is_hub_id, is_pinned, offline, read_revision
from mergekit_select.planner.determinism import Determinism, determinism
from mergekit_select.planner.vocabulary import tokenizer_source
from mergekit_select.provenance.parents import Parent, configurations, located, parents_of, resolve, roles_of
from mergekit_select.provenance.pinning import renamed
from mergekit_select.provenance.statement import (
    BUILD_TYPE,
    BuildDefinition,
    External,
    Internal,
    RecipeText,
    Reproducible,
    Resource,
    text_digest,
)
from mergekit_select.selection import draws

# Those of mergekit's merge options that change a byte of the output.
OPTIONS = (
    "allow_crimes",
    "copy_tokenizer",
    "lora_merge_dtype",
    "out_shard_size",
    "random_seed",
    "safe_serialization",
    "trust_remote_code",
    "unsafe_truncate_embeddings",
)
_PACKAGE = "pkg:pypi/"
PACKAGES = ("mergekit", "mergekit-select", "safetensors", "torch", "transformers")


def lock(
    text: str,
    place: str,
    options: MergeOptions,
    *,
    kept: BuildDefinition | None = None,
    upgrade: Collection[str] = (),
    locations: Mapping[str, str] | None = None,
    digests: Digests | None = None,
) -> BuildDefinition:
    """Resolve everything that a merge is made from: commits, digests of files, options, versions.

    Args:
        text: The recipe.
        place: What messages call it.
        options: As for the merge.
        kept: An earlier lock, at whose commits the models stay.
        upgrade: Models that do not stay there, as the recipe calls them.
        locations: Where models lie now; see ``inputs.references.relocated``.
        digests: Remembers what was hashed.

    Raises:
        UnreadableError: The recipe or a model cannot be read.
        RecipeError: ``locations`` or ``upgrade`` names no model of the recipe.
    """
    earlier = {parent.reference: parent.commit for parent in (parents_of(kept.resolved_dependencies) if kept else ())}
    moved = located(text, place, locations or {})
    digests = digests or Digests()
    parents = []
    named = sorted(roles_of(text, place).items())
    unknown = {*upgrade} - {name for reference, _ in named for name in (reference, reference.partition("@")[0])}
    if unknown:
        raise RecipeError(
            f"--upgrade must name a model of the recipe, got {', '.join(map(repr, sorted(unknown)))}; "
            f"it names {', '.join(reference for reference, _ in named)}"
        )
    for reference, roles in named:
        stays = None if {reference, reference.partition("@")[0]} & set(upgrade) else earlier.get(reference)
        cache = options.transformers_cache
        parents.append(resolve(reference, roles, digests, cache, stays, moved.get(reference)))
    return define(text, place, {name: getattr(options, name) for name in OPTIONS}, parents)


def define(
    text: str, place: str, options: Mapping[str, bool | int | str | None], parents: Sequence[Parent]
) -> BuildDefinition:
    """Return the build definition of a recipe, its options by name, and its models.

    Raises:
        UnreadableError: A model's file or commit has a name that cannot be recorded.
    """
    try:
        described = {str(resource.uri): resource for parent in parents for resource in list(parent.resources())[1:]}
        heads = [next(parent.resources()) for parent in parents]
    except ValidationError as error:
        raise UnreadableError(f"{place}: a model cannot be recorded: {one_line(error)}") from error
    packages = [Resource(uri=f"{_PACKAGE}{name}@{importlib.metadata.version(name)}") for name in PACKAGES]
    return BuildDefinition(
        build_type=BUILD_TYPE,
        external_parameters=External(
            recipe=RecipeText(text=text, sha256=text_digest(text)),
            options=dict(options),
            reproducible=_reproducible(text, place),
        ),
        internal_parameters=Internal(draws=draws.VERSION),
        resolved_dependencies=[*heads, *(described[uri] for uri in sorted(described)), *packages],
    )


def recorded_options(definition: BuildDefinition, options: MergeOptions, given: Collection[str] = ()) -> MergeOptions:
    """Return options with the recorded ones in their place, but for trust in code, which no record can give.

    Args:
        definition: The record.
        options: Where caches are, and on which device.
        given: Names of options that stay whatever is recorded.

    Raises:
        UnreadableError: A recorded option is of another type.
    """
    recorded = definition.external_parameters.options
    values = {name: recorded[name] for name in OPTIONS if name in recorded and name not in given}
    try:
        return MergeOptions.model_validate(
            {**options.model_dump(), **values, "trust_remote_code": options.trust_remote_code}
        )
    except ValidationError as error:
        raise UnreadableError(f"externalParameters.options: {one_line(error)}; get the file again") from error


def pinned(definition: BuildDefinition, place: str) -> str:
    """Return the recipe with every hub model at its commit."""
    parents = parents_of(definition.resolved_dependencies)
    return renamed(definition.recipe, place, {parent.reference: parent.pinned for parent in parents})


def configuration(definition: BuildDefinition, place: str, locations: Mapping[str, str]) -> MergeConfiguration | None:
    """Return the one merge of a lock, its models where they are to be taken from; None where it has several."""
    text = pinned(definition, place)
    merges = configurations(renamed(text, place, located(definition.recipe, place, locations)), place)
    return merges[0][1] if len(merges) == 1 else None


def notes(parents: list[Parent]) -> Findings:
    """Tell what the reader of a lock should know: folders that hide a hub's model, branches that have moved.

    Raises:
        UnusableModelError: The hub refuses a model, or cannot be asked.
    """
    found = Findings()
    for parent in parents:
        if parent.commit is None and is_hub_id(parent.path) and "/" in parent.path and os.path.isdir(parent.path):
            found.add(kinds.LOCAL_BEFORE_HUB, parent.reference, path=parent.path)
        if parent.commit is not None and not is_pinned(parent.revision) and not offline():
            told = {"revision": parent.revision or "its branch", "commit": parent.commit}
            try:
                now = read_revision(parent.path, parent.revision).commit
            except UnusableModelError as error:
                if error.kind != kinds.HUB_REVISION_GONE:
                    raise
                found.add(kinds.REVISION_REMOVED, parent.reference, **told)
                continue
            if now != parent.commit:
                found.add(kinds.REVISION_MOVED, parent.reference, found=now, path=parent.path, **told)
    return found


def stale(recorded: BuildDefinition, now: BuildDefinition, place: str) -> Findings:
    """Compare a lock with what is there now: recipe, options, draws, packages, models and each of their files."""
    found = version_notes(recorded)
    expected, draws_now = recorded.internal_parameters.draws, now.internal_parameters.draws
    if draws_now != expected:
        found.add(kinds.LOCK_DRAWS, "draws", str(draws_now), expected=expected)
    before, after = recorded.external_parameters, now.external_parameters
    if before.recipe != after.recipe:
        found.add(kinds.LOCK_RECIPE, place, after.recipe.sha256, expected=before.recipe.sha256)
    for name, option in sorted(before.options.items()):
        if (value := after.options.get(name)) != option:
            told = {"option": f"--{name.replace('_', '-')}", "expected": option}
            found.add(kinds.LOCK_OPTION, "options", repr(value), **told)
    known = {parent.reference: parent for parent in parents_of(recorded.resolved_dependencies)}
    there = {parent.reference: parent for parent in parents_of(now.resolved_dependencies)}
    for reference in sorted(known.keys() ^ there.keys()):
        found.add(kinds.LOCK_MODEL, reference, "not in the lock" if reference in there else "not in the recipe")
    for reference in sorted(known.keys() & there.keys()):
        found += file_differences(reference, known[reference].files, there[reference].files)
    return found


def version_notes(recorded: BuildDefinition) -> Findings:
    """Tell which packages are of other versions here than where the lock was made."""
    found = Findings()
    for resource in recorded.resolved_dependencies:
        package, _, expected = (resource.uri or "").removeprefix(_PACKAGE).partition("@")
        if package in PACKAGES and (here := importlib.metadata.version(package)) != expected:
            found.add(kinds.VERSION_DIFFERS, package, here, package=package, expected=expected)
    return found


def file_differences(place: str, recorded: Collection[File], found: Collection[File], partly: bool = False) -> Findings:
    """Compare files with those recorded.

    Args:
        place: The model.
        recorded: What its files should be.
        found: What they are.
        partly: Whether each side may lack files that the other has.
    """
    problems = Findings()
    there = {file.path: file for file in found}
    for file in recorded:
        now = there.pop(file.path, None)
        if now is None:
            if not partly:
                problems.add(kinds.INPUT_MISSING, place, file=file.path)
        elif not file.same(now):
            algorithm = next((name for name in file.digest if name in now.digest), next(iter(file.digest)))
            told: dict[str, Any] = {"algorithm": algorithm, "expected": file.digest[algorithm]}
            problems.add(
                kinds.INPUT_CHANGED, place, now.digest.get(algorithm, f"{now.size} bytes"), file=file.path, **told
            )
    for path in () if partly else sorted(there):
        problems.add(kinds.INPUT_ADDED, place, file=path)
    return problems


def _reproducible(text: str, place: str) -> Reproducible:
    levels = {_level(config) for _, config in configurations(text, place)}
    order: tuple[Reproducible, ...] = ("random", "unknown", "bits on the same platform", "bits")
    return next(level for level in order if level in levels)


def _level(config: MergeConfiguration) -> Reproducible:
    known = determinism(config.merge_method)
    if known is Determinism.RANDOM or tokenizer_source(config) == "union":
        return "random"
    if known is Determinism.UNKNOWN:
        return "unknown"
    adapters = any(reference.lora is not None for reference in config.referenced_models())
    return "bits" if known is Determinism.EXACT and not adapters else "bits on the same platform"
