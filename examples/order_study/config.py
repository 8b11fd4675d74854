"""A study from a YAML file, and what is wrong with it in one line per problem."""

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from examples.order_study.errors import StudyError
from examples.order_study.settings import FreshBase, GivenBase, Study
from examples.order_study.sources import HubDataset, JsonLines, Text

# The tags by which pydantic tells apart what can stand in one place; it puts them into the path of an error.
_SOURCES: dict[str, type[BaseModel]] = {"pydoc_data.topics": Text, "jsonl": JsonLines, "datasets": HubDataset}
_TAGS: dict[str, type[BaseModel]] = {**_SOURCES, "fresh": FreshBase, "given": GivenBase}


def load_study(path: Path, changes: Sequence[str] = ()) -> Study:
    """Read the configuration of a study.

    Args:
        path: The file.
        changes: Settings in place of those of the file, such as "fine_tuning.schedule=linear"; values are YAML.

    Raises:
        StudyError: It cannot be read, or breaks rules; each of these has a line of the message.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(
            f"a study is read from a YAML file, but {path} cannot be read ({error.strerror}): check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise StudyError(f"a study is read from a YAML file, but {path} is not YAML ({reason}): mend it") from error
    if not isinstance(content, dict):
        raise StudyError(
            f"a study is a mapping of settings, but {path} holds {type(content).__name__}: write for example "
            "`orders: [1, 2, 3]`"
        )
    for change in changes:
        _set(content, change)
    try:
        study = Study.model_validate(content)
        study.each_throw()
        return study
    except ValidationError as error:
        raise StudyError("\n".join(f"{path}: {_line(details)}" for details in error.errors())) from error


def _set(content: dict[str, Any], change: str) -> None:
    place, equals, text = change.partition("=")
    *parents, last = place.split(".")
    for parent in parents:
        if not isinstance(content.setdefault(parent, {}), dict):
            raise StudyError(
                f"--set names a setting by its place, but {parent} in {change!r} has no settings below it: correct it"
            )
        content = content[parent]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        equals = ""
    if not equals or not last:
        raise StudyError(f"--set takes a setting and its value, got {change!r}: write a.b=value, the value as in YAML")
    content[last] = value


def _line(error: ErrorDetails) -> str:
    location, kind = error["loc"], error["type"]
    place = ".".join(str(key) for key in location if key not in _TAGS)
    if kind == "extra_forbidden":
        known = _fields(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"{place} is no setting: " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")
    if kind == "missing":
        return f"{place} is missing: add it"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return f"{place}.source must say where the data come from: {', '.join(_SOURCES)}"
    text = error["msg"].removeprefix("Value error, ")
    if kind != "value_error":
        text = f"{text[0].lower()}{text[1:]}, got {error['input']!r}: change it"
    return f"{place}: {text}" if place else text


def _fields(location: tuple[int | str, ...]) -> list[str]:
    """The settings known at a place."""
    models: list[type[BaseModel]] = [Study]
    for key in location:
        if key in _TAGS:
            models = [_TAGS[str(key)]]
        elif isinstance(key, str):
            models = [
                found
                for model in models
                if key in model.model_fields
                for found in _models(model.model_fields[key].annotation)
            ]
    return [name for model in models for name in model.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple):
        return [model for argument in get_args(annotation) for model in _models(argument)]
    return []
