"""Recipes with one mistake each, and the proof that the mistake is one: the merge fails, or goes silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mergekit_select.check import check
from mergekit_select.findings import Finding, Report, Severity
from tests.support.models import Family
from tests.support.recipes import Recipe, merge, written


@dataclass(frozen=True)
class Case:
    """A recipe and its merge options. The merge raises, unless `wrong` holds for its output."""

    config: Recipe
    wrong: Callable[[Path], bool] | None = None
    options: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[Family, Path], Case]


class Cases:
    """The cases of a module by name, each of which shows one kind of error."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self._makers: dict[str, Maker] = {}

    def add(self, kind: str) -> Callable[[Maker], Maker]:
        """Decorate a function that makes a case from the session's models and a folder of its own."""

        def decorate(make: Maker) -> Maker:
            assert make.__name__ not in self.kinds
            self.kinds[make.__name__] = kind
            self._makers[make.__name__] = make
            return make

        return decorate

    def prove(self, name: str, llamas: Family, folder: Path) -> None:
        """Assert that `check` finds the error, and that the merge fails or goes wrong."""
        case = self._makers[name](llamas, folder)
        report = checked(folder, case.config, folder / "out", **case.options)
        assert self.kinds[name] in kinds(report, Severity.ERROR), [str(f) for f in report.findings]
        assert not report.passes()
        if case.wrong is None:
            with pytest.raises(Exception, match=r"."):
                merge(case.config, folder / "out", **case.options)
        else:
            assert case.wrong(merge(case.config, folder / "out", **case.options))


def checked(folder: Path, config: Recipe | list[Recipe], out: Path | str | None = None, **options: Any) -> Report:
    """The report on a recipe, or on several in one file, under mergekit's merge options."""
    from mergekit.options import MergeOptions

    documents = config if isinstance(config, list) else [config]
    return check(written(folder / "recipe.yml", *documents), out, MergeOptions(**options))


def kinds(report: Report, severity: Severity | None = None) -> list[str]:
    """The kinds of a report's findings."""
    return [f.kind for f in report.findings if severity is None or f.severity is severity]


def only(report: Report, kind: str) -> Finding:
    """The one finding of this kind."""
    found = [finding for finding in report.findings if finding.kind == kind]
    assert len(found) == 1, [str(f) for f in report.findings]
    return found[0]
