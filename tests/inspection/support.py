"""What the tests of ``inspect`` share: running it, and the groups that its answer counts by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import Result
from mergekit.config import MergeConfiguration

from mergekit_select.bits import integers
from mergekit_select.inspection import Inspection, inspect
from tests.support.commands import invoke
from tests.support.recipes import Recipe

PARAMETERS = 19_616  # of a merge of small_family()


def inspected(recipe: Recipe) -> Inspection:
    """What `inspect` answers in Python."""
    return inspect(MergeConfiguration.model_validate(recipe))


def ran(recipe: Recipe | bytes, folder: Path, *arguments: object) -> Result:
    """What the command answers to a recipe, or to what else is written into the file."""
    file = folder / "recipe.yml"
    file.write_bytes(recipe if isinstance(recipe, bytes) else yaml.safe_dump(recipe).encode())
    return invoke("inspect", file, *arguments)


def same(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements have the same bits."""
    return int((integers(a) == integers(b)).sum())


def places(answer: Inspection) -> Iterator[tuple[Any, list[str]]]:
    """Every grouping: its tally, and the names of its tensors."""
    yield answer.total, [tensor.name for tensor in answer.tensors]
    for layer, tally in answer.layers.items():
        yield tally, [tensor.name for tensor in answer.tensors if tensor.layer == layer]
    for module, tally in answer.modules.items():
        yield tally, [tensor.name for tensor in answer.tensors if tensor.module == module]
    for tensor in answer.tensors:
        yield tensor.tally, [tensor.name]
