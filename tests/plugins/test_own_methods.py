"""The package's own methods go through the same door as everybody's; with a stand-in for mergekit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.plugins.support import INSTALLED, METHOD, NAMES, SKIPPED, STAND_IN, Sandbox, distribution, python


@pytest.fixture
def own(sandbox: Sandbox) -> Sandbox:
    """The sandbox with a distribution mergekit-select whose methods are stand-ins."""
    source = METHOD.format("parameter_selection") + (
        "from mergekit_select import _plugins, _startup\n"
        "_plugins.register_methods(method, and_plugins=not _startup.turned_off())\n"
    )
    entries = {"parameter_selection": "mergekit_select.methods:method"}
    distribution(sandbox.site, "mergekit-select", entries, {"mergekit_select/methods.py": source})
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    return sandbox


FIRST = "import mergekit_select.methods\n"


def test_own_methods_through_the_same_door(own: Sandbox) -> None:
    assert own.names() == ["linear", "parameter_selection", "good"]


def test_own_module_first(own: Sandbox) -> None:
    assert sorted(own.names(FIRST + NAMES)) == ["good", "linear", "parameter_selection"]


@pytest.mark.parametrize("module", ["aardvark", "mergekit_select_more", "zebra"])
def test_a_module_that_merges_while_it_is_imported(own: Sandbox, module: str) -> None:
    (own.plugins / f"{module}.py").write_text(NAMES)
    assert own.names(f"import {module}") == ["linear", "parameter_selection", "good"]


def test_own_module_without_startup_file(own: Sandbox) -> None:
    assert own.names(start=False) == ["linear"]
    assert own.names(FIRST + NAMES, start=False) == ["linear", "parameter_selection", "good"]
    assert own.names(NAMES + FIRST + NAMES, start=False)[1:] == ["linear", "parameter_selection", "good"]


def test_own_module_without_metadata(own: Sandbox) -> None:
    shutil.rmtree(own.site / "mergekit_select-1.0.dist-info")
    assert own.names(FIRST + NAMES, start=False) == ["linear", "parameter_selection", "good"]


def test_own_module_where_discovery_is_turned_off(own: Sandbox) -> None:
    assert own.names(MERGEKIT_SELECT_DISABLE="1") == ["linear"]
    assert own.names(FIRST + NAMES, MERGEKIT_SELECT_DISABLE="1") == ["linear", "parameter_selection"]


def test_the_real_module_where_discovery_is_turned_off(tmp_path: Path) -> None:
    distribution(tmp_path, "good", {"good": "good:method"}, {"good.py": "raise AssertionError('imported')"})
    code = f"import mergekit_select.methods as own\n{NAMES}print(*own.OWN)"
    done = python(code, tmp_path, INSTALLED, options=(), MERGEKIT_SELECT_DISABLE="1")
    names, own = map(str.split, done.stdout.splitlines())
    assert names[-len(own) :] == own
    assert "good" not in done.stderr


def test_own_names_come_first(own: Sandbox) -> None:
    own.add("a", {"parameter_selection": "a:method"}, {"a.py": METHOD.format("parameter_selection")})
    result = own.run()
    assert result.stdout == "linear parameter_selection good\n"
    assert result.stderr == (
        "mergekit-select: skipped entry point 'parameter_selection = a:method' of a 1.0: "
        "the name 'parameter_selection' is taken by "
        "entry point 'parameter_selection = mergekit_select.methods:method' of mergekit-select 1.0, "
        "and stays with it. Update or uninstall a; its author can choose another name.\n"
    )


AGAIN = "import mergekit_select._plugins as p; p.register_plugins()\n"


@pytest.mark.parametrize("code", [NAMES, FIRST + NAMES, FIRST + AGAIN + NAMES])
def test_a_mergekit_that_has_such_a_method_itself(own: Sandbox, code: str) -> None:
    module = own.site / "mergekit" / "merge_methods" / "__init__.py"
    module.write_text(STAND_IN + "register(MergeMethod('parameter_selection'))")
    result = own.run(code)
    assert result.stdout == "linear parameter_selection good\n"
    assert result.stderr.count("\n") == 1
    assert "the name 'parameter_selection' is taken by mergekit.merge_methods, and stays" in result.stderr


def test_a_mergekit_that_reads_the_group_itself(own: Sandbox) -> None:
    module = own.site / "mergekit" / "merge_methods" / "__init__.py"
    code = (
        "from importlib.metadata import entry_points\n"
        "for entry in entry_points(group='mergekit.merge_methods'): register(entry.load())"
    )
    module.write_text(STAND_IN + code)
    assert sorted(own.names()) == ["good", "linear", "parameter_selection"]


def test_a_plugin_that_builds_on_ours(own: Sandbox) -> None:
    source = "from mergekit_select.methods import method as other\n" + METHOD.format("built")
    own.add("built", {"built": "built:method"}, {"built.py": source})
    for start in ("", FIRST):
        assert sorted(own.names(start + NAMES)) == ["built", "good", "linear", "parameter_selection"]
    result = own.run("import built\n" + NAMES)
    assert sorted(result.stdout.split()) == ["good", "linear", "parameter_selection"]
    assert result.stderr == SKIPPED.format("built", "built:method", "built")
