"""Repeated measurements of several contestants, interleaved, and their median and spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repeated measurements."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


def round_robin(
    runs: Mapping[str, Callable[[], T]], rounds: int, enough: Callable[[list[T]], bool] = lambda _: False
) -> dict[str, list[T]]:
    """Call each contestant once per round, so that a slow minute of the machine falls on all of them.

    Args:
        runs: What to call for each contestant; returns one measurement.
        rounds: The most measurements of one contestant. Each round begins one contestant further on: none always
            follows the same one's cold caches.
        enough: Says from the measurements so far (one or more) whether a contestant leaves the following rounds.

    Returns:
        At least one measurement for each.
    """
    names = list(runs)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if not results[name] or not enough(results[name]):
                results[name].append(runs[name]())
    return results
