"""The models that a merge is made from: which they are, which bytes, and the recipe that names exactly these."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from mergekit.common import ModelPath
from mergekit.config import MergeConfiguration

from mergekit_select import kinds
from mergekit_select.errors import RecipeError, UnreadableError
from mergekit_select.findings import UnusableModelError
from mergekit_select.inputs.digests import Digests, File, folder_files, root_digest
from mergekit_select.inputs.hub import is_hub_id, is_pinned, licence_of, read_revision
from mergekit_select.inputs.recipe import parse_recipes, validated
from mergekit_select.inputs.references import is_local, references, relocated
from mergekit_select.provenance.statement import MOST_BYTES, Resource

_HUB, _FILE = "pkg:huggingface/", "file:"


@dataclass(frozen=True)
class Parent:
    """One model or adapter that a merge reads.

    Attributes:
        reference: As the recipe calls it: a path or hub id, with ``@revision`` where it has one.
        roles: What it is used as: ``adapter``, ``base``, ``model``, ``tokenizer``.
        commit: The commit on the hub; None for a local folder.
        licence: As its card gives it.
        files: What it consists of.
    """

    reference: str
    roles: tuple[str, ...]
    commit: str | None
    licence: str | None
    files: tuple[File, ...]

    @property
    def path(self) -> str:
        """The reference without revision."""
        return self.reference.partition("@")[0]

    @property
    def revision(self) -> str | None:
        """The revision in the reference."""
        return self.reference.partition("@")[2] or None

    @property
    def pinned(self) -> str:
        """The reference that names the commit."""
        return f"{self.path}@{self.commit}" if self.commit else self.reference

    @property
    def uri(self) -> str:
        """As a package URL, or as ``file:``."""
        return f"{_HUB}{self.path}@{self.commit}" if self.commit else f"{_FILE}{quote(self.reference)}"

    def resources(self) -> Iterator[Resource]:
        """Describe the model, then each of its files, as in-toto does."""
        digest = {"gitCommit": self.commit} if self.commit else {"sha256": _root(self.files)}
        told = {"reference": self.reference, "roles": list(self.roles), "licence": self.licence}
        told = {name: value for name, value in told.items() if value is not None}
        yield Resource(name=self.path, uri=self.uri, digest=digest, annotations=told)
        for file in self.files:
            uri = f"{self.uri}#{quote(file.path)}"
            yield Resource(name=file.path, uri=uri, digest=dict(file.digest), annotations={"size": file.size})


def parents_of(resources: Iterable[Resource]) -> list[Parent]:
    """Return the models that resolved dependencies describe.

    Raises:
        UnreadableError: A description lacks something, or contradicts itself.
    """
    heads: list[Resource] = []
    files: dict[str, list[File]] = {}
    for resource in resources:
        uri, separator, path = (resource.uri or "").partition("#")
        size = (resource.annotations or {}).get("size")
        if separator:
            if not isinstance(size, int) or not 0 <= size < MOST_BYTES or not resource.digest:
                raise UnreadableError(
                    f"resolvedDependencies: {resource.uri} must have a size and a digest, got {size!r}"
                )
            files.setdefault(uri, []).append(File(unquote(path), size, dict(resource.digest)))
        elif uri.startswith((_HUB, _FILE)):
            heads.append(resource)
    return [_parent(head, tuple(files.get(str(head.uri), ()))) for head in heads]


def _parent(head: Resource, files: tuple[File, ...]) -> Parent:
    told, uri = head.annotations or {}, str(head.uri)
    reference, roles, licence = told.get("reference"), told.get("roles"), told.get("licence")
    if not isinstance(reference, str) or not isinstance(roles, list) or not files:
        raise UnreadableError(f"resolvedDependencies: {uri} must have a reference, roles and files")
    commit = uri.rpartition("@")[2] if uri.startswith(_HUB) else None
    parent = Parent(reference, tuple(map(str, roles)), commit, licence if isinstance(licence, str) else None, files)
    if parent.uri != uri or len({file.path for file in files}) != len(files):
        raise UnreadableError(f"resolvedDependencies: {uri} must be of the model {reference!r}, each file once")
    if commit is not None and is_pinned(parent.revision) and parent.revision != commit:
        raise UnreadableError(f"resolvedDependencies: {uri} must be at the commit that the recipe names, {reference}")
    if commit is None and head.digest != {"sha256": _root(files)}:
        raise UnreadableError(f"resolvedDependencies: {uri} must have the digest of its files, got {head.digest}")
    return parent


def _root(files: Iterable[File]) -> str:
    try:
        return root_digest({file.path: file.digest["sha256"] for file in files})
    except KeyError as error:
        raise UnreadableError("resolvedDependencies: each file of a local model must have a sha256") from error


def configurations(text: str, place: str) -> list[tuple[str | None, MergeConfiguration]]:
    """Return the merges of a recipe with their names.

    Raises:
        RecipeError: It is no recipe.
    """
    return [(recipe.name, validated(recipe, place)) for recipe in parse_recipes(text, place)]


def roles_of(text: str, place: str) -> dict[str, set[str]]:
    """Return what a recipe uses each model and adapter as; merges of the same file are no models.

    Raises:
        RecipeError: It is no recipe.
    """
    merges = configurations(text, place)
    stages = {name for name, _ in merges}
    roles: dict[str, set[str]] = {}
    for _, config in merges:
        for key, reference in references(config):
            role = next((name for name in ("base", "tokenizer") if key.startswith(name)), "model")
            if reference.model.path not in stages:
                roles.setdefault(str(reference.model), set()).add(role)
            if reference.lora is not None:
                roles.setdefault(str(reference.lora), set()).add("adapter")
    return roles


def require_same_models(text: str, place: str, parents: Sequence[Parent]) -> None:
    """Refuse a record whose recipe names other models than those recorded, or one of which is recorded twice.

    Raises:
        UnreadableError: It is such a record, or its recipe is no recipe.
    """
    recorded, named = [parent.reference for parent in parents], roles_of(text, place).keys()
    wrong = sorted(name for name in {*recorded, *named} if recorded.count(name) != (name in named))
    if wrong:
        raise UnreadableError(
            f"{place}: resolvedDependencies must have each model of the recipe once, and no other, got "
            f"{recorded.count(wrong[0])} of {wrong[0]!r}; get the file again"
        )


def resolve(
    reference: str,
    roles: Iterable[str],
    digests: Digests,
    cache: str | None = None,
    kept: str | None = None,
    location: str | None = None,
) -> Parent:
    """Find out which bytes a model is: by hashing a local folder, by asking the hub otherwise.

    Args:
        reference: As the recipe calls it.
        roles: What it is used as.
        digests: Remembers what was hashed.
        cache: As mergekit's --transformers-cache.
        kept: The commit to stay at, where an earlier lock has one.
        location: Where it lies now, if not where the recipe says.

    Raises:
        UnreadableError: It is not there, or cannot be read.
    """
    path = ModelPath.model_validate(location or reference)
    roles = tuple(sorted(roles))
    if os.path.exists(path.path):  # as mergekit asks
        folder = Path(path.path)
        files = folder_files(folder, digests) if folder.is_dir() else ()
        if not files:
            raise UnreadableError(f"model {reference}: {folder} must be a folder with a model's files")
        return Parent(reference, roles, None, licence_of(folder), files)
    if is_local(path.path) or not is_hub_id(path.path):
        raise UnreadableError(
            f"model {reference}: there is no folder {path.path}; local paths begin at the current folder"
        )
    try:
        found = read_revision(path.path, kept or path.revision, cache, digests)
    except UnusableModelError as error:
        if kept and error.kind == kinds.HUB_REVISION_GONE:
            raise UnreadableError(
                f"model {reference}: the locked commit {kept} is not on the hub any more; "
                f"give --upgrade {path.path} to follow its branch"
            ) from error
        raise UnreadableError(f"model {reference}: {error}") from error
    return Parent(reference, roles, found.commit, found.licence, found.model)


def located(text: str, place: str, locations: Mapping[str, str]) -> dict[str, str]:
    """Return where each model lies that ``locations`` moves, by what the recipe calls it.

    Raises:
        RecipeError: A location matches no model of the recipe.
    """
    moved: dict[str, str] = {}
    merges = configurations(text, place) if locations else []
    for _, config in merges:
        try:
            pairs = zip(references(config), references(relocated(config, locations)), strict=True)
        except RecipeError:
            if len(merges) == 1:
                raise
            continue  # of another merge in the file
        for (_, before), (_, after) in pairs:
            for old, new in ((before.model, after.model), (before.lora, after.lora)):
                if old is not None and old != new:
                    moved[str(old)] = str(new)
    return moved
