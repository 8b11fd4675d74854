"""What is to be merged, in a form that travels to other processes and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """A merge that was asked for.

    Attributes:
        recipe: The recipe's file.
        out: The output folder, as it was given: its last part titles the model card.
        options: Fields of ``mergekit.options.MergeOptions``.
        share: Number and count: which share of the output's files is to be merged; None for all.
        verbatim: Whether mergekit_config.yml is the recipe's text, as mergekit-yaml stores it, or what the planner
            makes of it, as mergekit-multi does.
    """

    recipe: str
    out: str
    options: Mapping[str, Any]
    share: tuple[int, int] | None = None
    verbatim: bool = True
