"""The startup files: what they hold, and what they cost an interpreter's start."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest

from mergekit_select import _startup
from tests.plugins.support import PTH, START, output, python


def added_modules(site_dir: Path) -> set[str]:
    # Another startup file goes first: for the first one, whatever it says, Python 3.13 loads a codec.
    other = site_dir.parent / "other"
    other.mkdir()
    (other / "other.pth").write_text("# nothing\n")
    code = f"""
        import site, sys
        site.addsitedir({str(other)!r})
        before = set(sys.modules)
        site.addsitedir({str(site_dir)!r})
        print(*set(sys.modules) - before)
    """
    return set(python(code).stdout.split())


def check_start(site_dir: Path) -> None:
    assert added_modules(site_dir) == {"mergekit_select", "mergekit_select._startup"}


HEAVY = """
import sys
print(*{"torch", "mergekit", "importlib.metadata", "mergekit_select._startup"} & set(sys.modules))
"""


def test_start_imports_two_modules_and_nothing_else(site_dir: Path) -> None:
    check_start(site_dir)


@pytest.mark.parametrize("module", ["torch", "mergekit", "importlib.metadata", "typing"])
def test_that_test_can_fail(site_dir: Path, module: str) -> None:
    if module in ("torch", "mergekit"):
        (site_dir / f"{module}.py").touch()
    startup = site_dir / "mergekit_select" / "_startup.py"
    startup.write_text(f"import {module}\n" + startup.read_text())
    with pytest.raises(AssertionError):
        check_start(site_dir)


def test_start_in_this_environment() -> None:
    assert python(HEAVY, options=()).stdout.split() == ["mergekit_select._startup"]


def test_site_run_by_hand() -> None:
    code = "import site, sys; print('mergekit_select' in sys.modules); site.main(); "
    assert python(code + HEAVY).stdout.split() == ["False", "mergekit_select._startup"]


@pytest.mark.parametrize("module", ["torch", "mergekit", "importlib.metadata"])
def test_that_test_can_fail_too(tmp_path: Path, module: str) -> None:
    if module != "importlib.metadata":
        (tmp_path / f"{module}.py").touch()
    (tmp_path / "sitecustomize.py").write_text(f"import {module}\n")
    assert module in python(HEAVY, tmp_path, options=()).stdout.split()


def test_pth_has_one_import_line_that_all_supported_pythons_can_read() -> None:
    lines = PTH.read_bytes().decode("ascii").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "import mergekit_select._startup; mergekit_select._startup.install()"
    ]


def test_pth_is_read_after_the_one_of_an_editable_install() -> None:
    assert PTH.name > "_editable_impl_mergekit_select.pth"


def test_start_file_names_the_same_function() -> None:
    # As PEP 829 describes the file; no Python that reads it has been tried.
    lines = START.read_bytes().decode("ascii").splitlines()
    (entry,) = [line for line in lines if line and not line.startswith("#")]
    assert START.stem == PTH.stem
    assert pkgutil.resolve_name(entry) is _startup.install


def test_start_file_alone_does_it(site_dir: Path, mergekit: Path) -> None:
    (site_dir / PTH.name).unlink()
    code = """
        import pkgutil
        pkgutil.resolve_name(ENTRY)()
        import mergekit.merge_methods
    """.replace("ENTRY", repr(START.read_text().splitlines()[-1]))
    assert output(code, site_dir, mergekit) == ["executed", "registered"]
