"""Read a recipe file: one merge, or several of mergekit-multi."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from mergekit.config import MergeConfiguration

from mergekit_select.errors import RecipeError, UnreadableError, one_line
from mergekit_select.inputs.bounds import MOST_RECIPE_BYTES, BoundError, compose_yaml, construct, read_file
from mergekit_select.inputs.files import RECIPE


@dataclass(frozen=True)
class Recipe:
    """One merge as YAML gave it.

    Attributes:
        name: Its name in a mergekit-multi file, else None.
        raw: The document without its name.
        duplicates: Keys that stand twice in one mapping of it, of which YAML keeps the last.
    """

    name: str | None
    raw: dict[str, Any]
    duplicates: tuple[str, ...] = ()


def read_recipes(path: str | Path) -> list[Recipe]:
    """Return the merges in a recipe file, in the file's order.

    Raises:
        RecipeError: The file cannot be read, is no YAML, has no mapping with ``merge_method`` in it, or names a merge
            by a path that leads out of the folder for intermediate merges.
    """
    return parse_recipes(read_text(path), str(path))


def parse_recipes(text: str, path: str) -> list[Recipe]:
    """Return the merges in a recipe's text; ``path`` is what messages call it.

    Raises:
        RecipeError: As for ``read_recipes``.
    """
    try:
        nodes = compose_yaml(text)
        documents = [construct(node) for node in nodes]
        duplicates = [tuple(_duplicates(node)) for node in nodes]
    except BoundError as error:
        raise RecipeError(f"{path} is no recipe: {error}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise RecipeError(f"a recipe must be YAML, and {path} is not: {one_line(error)}") from error
    kept = [(document, keys) for document, keys in zip(documents, duplicates, strict=True) if document is not None]
    documents = [document for document, _ in kept]
    if not documents:
        raise RecipeError(f"a recipe must say merge_method and its models, and {path} is empty")
    for document in documents:
        if not isinstance(document, dict):
            raise RecipeError(
                f"a recipe must be a YAML mapping with merge_method and its models, "
                f"and {path} holds {one_line(repr(document), 60)}"
            )
    if not any("merge_method" in document for document in documents):
        keys = ", ".join(str(key) for document in documents for key in document)
        raise RecipeError(f"a recipe must say merge_method, and {path} has only the keys {one_line(keys, 100)}")
    return [_recipe(document, keys, path) for document, keys in kept]


def read_recipe(path: str | Path) -> MergeConfiguration:
    """Return the one merge in a recipe file, as mergekit-yaml reads it.

    Raises:
        RecipeError: As for ``read_recipes``, or the file holds several merges, or mergekit refuses what it holds.
    """
    return parse_recipe(read_text(path), str(path))


def parse_recipe(text: str, path: str) -> MergeConfiguration:
    """Return the one merge in a recipe's text; ``path`` is what messages call it.

    Raises:
        RecipeError: As for ``read_recipe``.
    """
    recipes = parse_recipes(text, path)
    if len(recipes) > 1:
        raise RecipeError(
            f"{path} must hold one merge, and holds {len(recipes)}; give one of them in a file of its own"
        )
    return validated(recipes[0], path)


def left_recipe(folder: Path) -> MergeConfiguration | None:
    """Return the recipe that mergekit left in the folder of a merge; None where there is none that it would read."""
    try:
        return read_recipe(folder / RECIPE)
    except RecipeError:
        return None


def validated(recipe: Recipe, path: str) -> MergeConfiguration:
    """Return a merge as mergekit reads it.

    Raises:
        RecipeError: mergekit refuses it.
    """
    try:
        return MergeConfiguration.model_validate(recipe.raw)
    except Exception as error:  # mergekit's validators raise what they like
        raise RecipeError(f"mergekit refuses the recipe {path}: {one_line(error)}") from error


def read_text(path: str | Path) -> str:
    """Return a recipe file's text, line endings as they are.

    Raises:
        RecipeError: It cannot be read, is too large, or is no UTF-8.
    """
    path = Path(path)
    try:
        content = read_file(path, MOST_RECIPE_BYTES)
    except UnreadableError as error:
        raise RecipeError(f"cannot read the recipe: {error}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"a recipe must be UTF-8 text, and {path} is not: byte {error.start} is invalid") from error


def _recipe(document: dict[Any, Any], duplicates: tuple[str, ...], path: str) -> Recipe:
    raw = dict(document)
    name = raw.pop("name", None)
    if name is None:
        return Recipe(None, raw, duplicates)
    if not isinstance(name, str):
        raise RecipeError(
            f"the name of a merge must be text, and {one_line(repr(name), 60)} in {path} is not; quote it"
        )
    if _leads_out(name):
        raise RecipeError(
            "the name of a merge must be a folder within the one for intermediate merges, "
            f"and {one_line(repr(name), 60)} in {path} leads out of it; call it otherwise, such as stage-1"
        )
    return Recipe(name, raw, duplicates)


def _leads_out(name: str) -> bool:
    """Whether a folder of that name may lie outside the folder it is made in, on any system."""
    return any(kind(name).anchor or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath))


def _duplicates(root: yaml.Node | None) -> Iterator[str]:
    """Yield keys that stand twice in one mapping, with their line."""
    visited: set[int] = set()  # an alias leads to the same node again
    nodes = [] if root is None else [root]
    while nodes:
        node = nodes.pop()
        if id(node) in visited or isinstance(node, yaml.ScalarNode):
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                nodes.append(value)
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        yield f"{key.value} in line {key.start_mark.line + 1}"
                    seen.add(key.value)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
