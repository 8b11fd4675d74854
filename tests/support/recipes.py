"""Recipes as tests write them, and the merge that stock mergekit makes of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.commands import run

SELECTION = "parameter_selection"
RESAMPLING = "parameter_selection_resampling"
METHODS = [SELECTION, RESAMPLING]

Recipe = dict[str, Any]


def recipe(
    method: str,
    base: Path | str | None,
    models: Iterable[Path | str],
    *,
    model_parameters: Sequence[Mapping[str, Any]] | None = None,
    **keys: Any,
) -> Recipe:
    """A recipe of models, each with parameters of its own if any are given, and with keys of the whole recipe."""
    entries: list[Recipe] = [{"model": str(model)} for model in models]
    for entry, parameters in zip(entries, model_parameters or (), strict=bool(model_parameters)):
        entry["parameters"] = dict(parameters)
    return {
        "merge_method": method,
        **({} if base is None else {"base_model": str(base)}),
        "models": entries,
        **keys,
    }


def layers_of(first: int, end: int, *models: Path) -> Recipe:
    """A slice: these layers of each of the models."""
    return {"sources": [{"model": str(model), "layer_range": [first, end]} for model in models]}


def written(file: Path, *documents: Recipe) -> Path:
    """Write recipes into a file, and return it."""
    file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return file


def merge(
    recipe: Recipe, out: Path, *, new_process: bool = False, env: Mapping[str, str] | None = None, **options: Any
) -> Path:
    """Merge as mergekit-yaml does, and return the output's folder.

    Args:
        recipe: What to merge; left as it is.
        out: Where to; the recipe is written beside it.
        new_process: Whether to run the stock command itself, which takes some seconds more.
        env: Environment variables of the new process.
        options: mergekit's merge options by their names in MergeOptions.
    """
    file = written(out.parent / f"{out.name}.yml", recipe)
    if new_process:
        done = run("mergekit-yaml", file, out, *_flags(options), env=env)
        assert done.returncode == 0, done.stderr
        return out
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    source = file.read_text()
    LoaderCache.loaders.clear()  # global to the process, and stale once a checkpoint is written anew
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    try:
        run_merge(config, str(out), MergeOptions(quiet=True, **options), config_source=source)
    finally:
        LoaderCache.loaders.clear()
    return out


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        option = name.replace("_", "-")
        flags += [f"--{option}" if value else f"--no-{option}"] if isinstance(value, bool) else [f"--{option}={value}"]
    return flags
