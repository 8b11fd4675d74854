"""The models that a recipe names: where each stands in it, copies of a recipe with others, and the donor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from pydantic import BaseModel

from mergekit_select.errors import RecipeError

_Part = TypeVar("_Part")


def references(value: object) -> Iterator[tuple[str, ModelReference]]:
    """Yield every model reference in a part of a recipe, with its recipe key."""
    return parts(value, lambda part: isinstance(part, ModelReference))


def parts(value: object, wanted: Callable[[object], bool], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the parts of a recipe that are wanted, each with its recipe key; what is within them is not looked at."""
    if wanted(value):
        yield place.removeprefix("."), value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from parts(getattr(value, name), wanted, f"{place}.{name}")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from parts(item, wanted, f"{place}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from parts(item, wanted, f"{place}[{number}]")


def with_references(value: _Part, change: Callable[[ModelReference], ModelReference]) -> _Part:
    """Return a copy of a part of a recipe with every model reference changed."""

    def copy(item: Any) -> Any:
        if isinstance(item, ModelReference):
            return change(item)
        if isinstance(item, BaseModel):
            return item.model_copy(update={name: copy(getattr(item, name)) for name in type(item).model_fields})
        if isinstance(item, Mapping):
            return {key: copy(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return type(item)(copy(entry) for entry in item)
        return item

    result: _Part = copy(value)
    return result


def donor(config: MergeConfiguration) -> ModelReference | None:
    """Return the model that gives config and tokenizer to the output; None where mergekit takes an arbitrary one."""
    merged = config.referenced_models()
    return config.base_model or (merged[0] if len(merged) == 1 else None)


def relocated(config: MergeConfiguration, locations: Mapping[str, str]) -> MergeConfiguration:
    """Return a copy of a recipe whose models lie elsewhere.

    Args:
        config: The recipe; not modified.
        locations: Old location to new one. An old one matches a model's path, its path with ``@revision``, or
            the folders that its path begins with; where several match, the longest does.

    Raises:
        RecipeError: An old location matches no model of the recipe, or a new one is none.
    """
    unused = dict.fromkeys(locations)
    names: dict[str, None] = {}

    def move(path: ModelPath) -> ModelPath:
        names[str(path)] = None
        found = [old for old in locations if matches(str(path), old)]
        if not found:
            return path
        for old in found:
            unused.pop(old, None)
        old = max(found, key=len)
        if old in (str(path), path.path):
            try:
                return ModelPath.model_validate(locations[old])
            except Exception as error:  # mergekit raises what it likes
                raise RecipeError(
                    f"--map must say where {old} lies now, a folder or OWNER/NAME@REVISION, got {locations[old]!r}"
                ) from error
        return ModelPath(path=locations[old].rstrip("/") + path.path[len(old.rstrip("/")) :], revision=path.revision)

    def change(reference: ModelReference) -> ModelReference:
        lora = None if reference.lora is None else move(reference.lora)
        return reference.model_copy(update={"model": move(reference.model), "lora": lora})

    result = with_references(config.model_copy(deep=True), change)
    if unused:
        raise RecipeError(
            f"--map must name a model of the recipe, got {', '.join(map(repr, unused))}; it names {', '.join(names)}"
        )
    return result


def matches(reference: str, location: str) -> bool:
    """Whether a location is that of a model: its reference, that without revision, or a folder that it begins with."""
    path = reference.partition("@")[0]
    return location in (reference, path) or path.startswith(location.rstrip("/") + "/")


def is_local(path: str) -> bool:
    """Whether the text can only be a local path; ``owner/name`` may be an id on the hub."""
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
