"""The startup files where they are turned off, broken or interrupted: no program ends for it."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import pytest

from tests.plugins.support import STUB, output, python

FAILURE = (
    "mergekit-select: no merge methods of other packages are registered: {}. mergekit runs without them. "
    "Install what fits together: pip install --upgrade mergekit-select 'mergekit>=0.1.5,<0.2'; or set "
    "MERGEKIT_SELECT_DISABLE=1.\n"
)


@pytest.mark.parametrize(("value", "registered"), [("1", False), ("yes", False), ("0", True), ("", True)])
def test_switch(site_dir: Path, mergekit: Path, value: str, registered: bool) -> None:
    code = """
        print("mergekit_select._startup" in [type(finder).__module__ for finder in sys.meta_path])
        import mergekit.merge_methods
    """
    lines = output(code, site_dir, mergekit, MERGEKIT_SELECT_DISABLE=value)
    assert lines == [str(registered), "executed", *["registered"] * registered]


def test_switch_thrown_by_the_program(site_dir: Path, mergekit: Path) -> None:
    code = """
        import os
        os.environ["MERGEKIT_SELECT_DISABLE"] = "1"
        import mergekit.merge_methods
        assert not [finder for finder in sys.meta_path if "mergekit" in type(finder).__module__]
    """
    assert output(code, site_dir, mergekit) == ["executed"]


def test_a_failure_costs_one_line_even_where_warnings_are_errors(site_dir: Path, mergekit: Path) -> None:
    code = f"""
        def register_plugins(): raise RuntimeError("too bad")
        plugins.register_plugins = register_plugins
        import site; site.addsitedir({str(site_dir)!r})
        import mergekit.merge_methods
        print(mergekit.merge_methods.Method.__name__)
    """
    result = python(STUB + textwrap.dedent(code), mergekit, options=("-S", "-W", "error"))
    assert (result.returncode, result.stdout.split()) == (0, ["executed", "Method"])
    assert result.stderr == FAILURE.format("RuntimeError: too bad")


def test_a_package_with_a_module_missing(site_dir: Path, mergekit: Path) -> None:
    code = f"import site; site.addsitedir({str(site_dir)!r}); import mergekit.merge_methods"
    result = python(code, mergekit)
    assert (result.returncode, result.stdout) == (0, "executed\n")
    assert result.stderr.startswith(FAILURE.partition("{}")[0] + "ImportError: cannot import name '_plugins'")
    assert result.stderr.endswith(FAILURE.partition("{}")[2])
    assert result.stderr.count("\n") == 1


def test_a_startup_file_without_its_package(site_dir: Path) -> None:
    # Where an editable install's checkout is moved away: Python says so, and starts.
    shutil.rmtree(site_dir / "mergekit_select")
    result = python(f"import site; site.addsitedir({str(site_dir)!r}); print('started')")
    assert (result.returncode, result.stdout) == (0, "started\n")
    assert "ModuleNotFoundError: No module named 'mergekit_select'" in result.stderr


@pytest.mark.parametrize(("interruption", "code"), [("KeyboardInterrupt()", -2), ("SystemExit(3)", 3)])
def test_what_stops_the_program_stops_it(site_dir: Path, mergekit: Path, interruption: str, code: int) -> None:
    program = f"""
        def register_plugins(): raise {interruption}
        plugins.register_plugins = register_plugins
        import site; site.addsitedir({str(site_dir)!r})
        import mergekit.merge_methods
        print("went on")
    """
    result = python(STUB + textwrap.dedent(program), mergekit)
    assert (result.returncode, result.stdout) == (code, "executed\n")
    assert result.stderr.rstrip().endswith("KeyboardInterrupt") == (code == -2)


def test_a_second_try_after_ctrl_c_registers(site_dir: Path, mergekit: Path) -> None:
    code = """
        register = plugins.register_plugins
        def interrupted(): raise KeyboardInterrupt
        plugins.register_plugins = interrupted
        try:
            import mergekit.merge_methods
        except KeyboardInterrupt:
            print("interrupted")
        plugins.register_plugins = register
        import mergekit.merge_methods
    """
    assert output(code, site_dir, mergekit) == ["executed", "interrupted", "executed", "registered"]
