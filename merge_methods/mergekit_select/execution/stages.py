"""The merges of a mergekit-multi file, one after the other: each in its own folder, which keeps it when it is done."""

from __future__ import annotations

import os
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from mergekit.scripts.multimerge import load_config

from mergekit_select.errors import PlanError, RecipeError, UnreadableError, one_line
from mergekit_select.execution.request import Request
from mergekit_select.inputs.files import WORKSPACE, write_whole
from mergekit_select.inputs.recipe import parse_recipes, read_text


def staged(request: Request, intermediate: str) -> list[tuple[str | None, Request]]:
    """Return the merges of a file by name, each after those that it needs.

    Args:
        request: The file, and where the merge without a name goes.
        intermediate: The folder for the others, each in one of its name.

    Raises:
        RecipeError: The file is no recipe, or mergekit refuses it.
        PlanError: No merge goes to the output folder, or merges need each other.
        UnreadableError: A folder cannot be written to.
    """
    place = request.recipe
    text = read_text(place)
    parse_recipes(text, place)  # within bounds, which mergekit does not have
    if not os.path.isabs(intermediate) and not intermediate.startswith("."):
        intermediate = f"./{intermediate}"  # a path without a dot looks like a name on a hub
    try:
        configs, needs = load_config(text, intermediate)
        names = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        circle = " needs ".join(map(str, reversed(error.args[1])))
        raise PlanError(f"the merges of {place} must not need each other: {circle}") from error
    except Exception as error:  # mergekit raises what it likes
        raise RecipeError(f"mergekit refuses the recipe {place}: {one_line(error)}") from error
    if None not in configs:
        raise PlanError(f"{place} must have a merge without a name, which goes to {request.out}")
    result: list[tuple[str | None, Request]] = []
    for name in names:
        out = Path(request.out if name is None else Path(intermediate, name))
        recipe_file = out / WORKSPACE / "recipe.yml"
        try:
            recipe_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(recipe_file, configs[name].to_yaml())
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise UnreadableError(f"cannot write {recipe_file}: {one_line(error)}") from error
        result.append((name, replace(request, recipe=str(recipe_file), out=str(out), verbatim=False)))
    return result
