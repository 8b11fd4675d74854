"""Imports inside the package point one way: from commands down to bits and errors, as ARCHITECTURE.md draws it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "merge_methods" / "mergekit_select"

GROUND = {"errors", "bits", "findings", "kinds"}
# Each room, and the rooms that it may import from.
ALLOWED = {
    "errors": set[str](),
    "bits": set[str](),
    "findings": {"errors"},
    "kinds": {"findings"},
    "selection": {"bits", "errors"},
    "_startup": {"_plugins"},
    "_plugins": {"_entry_points", "errors"},
    "_entry_points": set[str](),
    "methods": {"selection", "_plugins", "_startup", "errors"},
    "inputs": GROUND,
    "planner": {"inputs", "selection", "methods"} | GROUND,
    "check": {"planner", "inputs", "methods", "_plugins", "_startup"} | GROUND,
    "inspection": {"planner", "inputs", "methods", "selection"} | GROUND,
    "verification": {"planner", "inputs"} | GROUND,
    "execution": {"planner", "inputs"} | GROUND,
    "provenance": {"planner", "inputs", "execution", "verification", "selection"} | GROUND,
    "cli": {"methods", "inputs", "check", "inspection", "verification", "execution", "provenance", "selection"}
    | GROUND,
    "__init__": {"selection", "errors"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(source: str) -> Iterator[str]:
    """Yield the modules of this package that a source imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "mergekit_select":
            yield from (f"mergekit_select.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mergekit_select."):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("mergekit_select."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    rooms = {name.split(".")[1] for name in imported(path.read_text("utf-8"))} - {room, "__version__"}
    assert rooms <= ALLOWED[room], f"{path} must import from {sorted(ALLOWED[room])} only"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_short_or_say_why(path: Path) -> None:
    source = path.read_text("utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert docstring
    assert len(source.splitlines()) <= 250 or "Longer than other modules" in docstring


def test_selection_does_not_know_mergekit() -> None:
    for path in FILES:
        if room_of(path) == "selection":
            names = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
            assert not any((node.module or "").split(".")[0] == "mergekit" for node in names)


def test_only_the_planner_touches_private_parts_of_mergekit() -> None:
    for path in FILES:
        if room_of(path) == "planner":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mergekit":
                private = [name.name for name in node.names if name.name.startswith("_")]
                assert not private, path
                assert not any(part.startswith("_") for part in (node.module or "").split(".")), path


def test_a_wrong_import_would_be_found() -> None:
    (found,) = imported("def late():\n    from mergekit_select.cli.check import command\n")
    assert found.split(".")[1] not in ALLOWED["inputs"]
