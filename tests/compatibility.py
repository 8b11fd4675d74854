"""docs/compatibility.md, written from what the tests found: `python -m tests.compatibility`.

A test says with `shows` which rows of the page it stands behind. This program runs these tests, notes how each ended
and writes the page; test_compatibility_page.py checks that the page has the rows that the tests have, and no others.
"""

from __future__ import annotations

import inspect
import itertools
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
FOLDER = Path(__file__).parent / "end_to_end"
MODULES = [
    "test_architectures",
    "test_checkpoint_forms",
    "test_dtypes",
    "test_tokenizers",
    "test_lora",
    "test_recipe_forms",
    "test_commands",
    "test_recipes",
]
SECTIONS = ["Architectures", "Checkpoints", "LoRA", "Recipe forms", "Commands and options", "Recipes"]
VERSIONS = ["mergekit", "torch", "transformers", "safetensors", "peft", "tokenizers"]
METHODS = ["parameter_selection", "parameter_selection_resampling"]
COLUMNS = {"parameter_selection": "selection", "parameter_selection_resampling": "resampling", "": "runs"}
UP_TO_PYTHON_312 = "from Python 3.13 on mergekit cannot, with any method: its lazy unpickler fails"
WORKS, GAP, NOT_RUN, FAILS = RESULTS = "yes", "mergekit cannot", "not run here", "FAILS"  # from good to bad


class Row(NamedTuple):
    """A line of the page: what was tried, with which of the methods, and what there is to say about it."""

    section: str
    what: str
    methods: tuple[str, ...]
    result: str
    note: str


def shows(
    section: str,
    what: str | Callable[..., str],
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    note: str | Callable[..., str] = "",
    gap: bool = False,
) -> Callable[[Any], Any]:
    """Say which row a test stands behind; `what` and `note` may be functions of the test's parameters.

    A test that is parametrised with `method` stands for that method alone; one without methods of its own, for a line
    with one result. With `gap` it shows that mergekit itself cannot: the row says so if the test passes.
    """
    assert section in SECTIONS

    def row(parameters: Mapping[str, Any]) -> Row:
        def text(of: str | Callable[..., str]) -> str:
            return of(**{name: parameters[name] for name in inspect.signature(of).parameters}) if callable(of) else of

        used = (parameters["method"],) if "method" in parameters else methods or ("",)
        return Row(section, text(what), used, GAP if gap else WORKS, text(note))

    def decorate(test: Any) -> Any:
        test.compatibility = row
        return test

    return decorate


def parameter_sets(test: Any) -> Iterator[dict[str, Any]]:
    """The parameters of every case of a test."""
    axes = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args[:2]
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            # pytest.param(…) carries its values and marks; with one name, a value stands for itself
            plain = [
                value.values if hasattr(value, "marks") else value if len(names) > 1 else (value,) for value in values
            ]
            axes.append([dict(zip(names, value, strict=True)) for value in plain])
    for combination in itertools.product(*reversed(axes)):
        yield {name: value for part in combination for name, value in part.items()}


def rows() -> list[Row]:
    """What the page is to hold, were all tests to pass."""
    found = []
    for module in MODULES:
        for test in vars(import_module(f"tests.end_to_end.{module}")).values():
            if row := getattr(test, "compatibility", None):
                found += [row(parameters) for parameters in parameter_sets(test)]
    return found


class Collector:
    """A pytest plugin that notes how every test ended that stands behind a row."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.results: list[Row] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            if row := getattr(item.function, "compatibility", None):
                self.rows[item.nodeid] = row(item.callspec.params if hasattr(item, "callspec") else {})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.rows.get(report.nodeid)
        if row is None or not (report.when == "call" or report.failed or report.skipped):
            return
        result = row.result if report.passed else NOT_RUN if report.skipped else FAILS
        self.results.append(row._replace(result=result))


def table(of: list[Row]) -> list[str]:
    """A section's rows, one line for each thing tried, one column for each method."""
    cells: dict[str, dict[str, str]] = {}
    notes: dict[str, str] = {}
    for row in of:
        notes[row.what] = notes.get(row.what) or row.note
        for method in row.methods:  # several tests may stand behind a cell: the worst result counts
            known = cells.setdefault(row.what, {}).get(method, WORKS)
            cells[row.what][method] = max(known, row.result, key=RESULTS.index)
    methods = [method for method in COLUMNS if any(method in results for results in cells.values())]
    head = ["", *(COLUMNS[method] for method in methods), ""]
    lines = [[what, *(results.get(method, "") for method in methods), notes[what]] for what, results in cells.items()]
    return [re.sub(r" +", " ", f"| {' | '.join(line)} |") for line in [head, ["---"] * len(head), *lines]]


def page(results: list[Row]) -> str:
    """The whole page."""
    text = (Path(__file__).parent / "compatibility_template.md").read_text(encoding="utf-8")
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in VERSIONS)])
    written = f"Written with {versions}, {platform.system()} on {platform.machine()}."
    text = text.replace("{versions}", textwrap.fill(written, 120))
    tables = [
        "\n".join([f"## {section}", "", *table([row for row in results if row.section == section])])
        for section in SECTIONS
    ]
    return text.replace("{tables}", "\n\n".join(tables))


def lines_on(text: str) -> dict[str, list[str]]:
    """The lines of each section's table, sorted; whether a line was run on the machine in question is left out."""
    found: dict[str, list[str]] = {section: [] for section in SECTIONS}
    section = ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif section in found and line.startswith("|"):
            found[section].append(line.replace(f"| {NOT_RUN} ", f"| {WORKS} "))
    return {section: sorted(lines) for section, lines in found.items()}


def main() -> int:
    """Run the tests and write the page; failures stand on it as such."""
    collector = Collector()
    tests = [str(FOLDER / f"{module}.py") for module in MODULES]
    status = pytest.main(["-q", *tests], [collector])
    PAGE.write_text(page(collector.results), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
