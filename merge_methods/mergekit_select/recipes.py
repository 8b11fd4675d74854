"""Read a recipe file: one merge, or several of mergekit-multi."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_select.errors import MergekitSelectError
from mergekit_select.findings import one_line

MOST_BYTES = 4 << 20  # the longest recipes seen have some hundred lines; more is another kind of file


class RecipeError(MergekitSelectError):
    """A recipe file that cannot be read as one."""


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
        RecipeError: The file cannot be read, is no YAML, or has no mapping with ``merge_method`` in it.
    """
    text = _read(Path(path))
    try:
        documents = list(yaml.safe_load_all(text))
        duplicates = [tuple(_duplicates(node)) for node in yaml.compose_all(text, Loader=yaml.SafeLoader)]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
    return [_recipe(document, keys) for document, keys in kept]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise RecipeError(f"a recipe must be a short YAML file, and {path} has more than {MOST_BYTES} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"a recipe must be UTF-8 text, and {path} is not: byte {error.start} is invalid") from error


def _recipe(document: dict[Any, Any], duplicates: tuple[str, ...]) -> Recipe:
    raw = dict(document)
    name = raw.pop("name", None)
    return Recipe(None if name is None else str(name), raw, duplicates)


def _duplicates(root: yaml.Node | None) -> Iterator[str]:
    """Yield keys that stand twice in one mapping, with their line."""
    seen: set[int] = set()  # an alias leads to the same node again
    nodes = [] if root is None else [root]
    while nodes:
        node = nodes.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [(key.value, key.start_mark.line + 1) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            names = [name for name, _ in keys]
            yield from (f"{name} in line {line}" for k, (name, line) in enumerate(keys) if name in names[:k])
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
