"""Entry points of the group lead to methods, however they and mergekit are imported; with a stand-in for mergekit."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.plugins.support import METHOD, NAMES, Sandbox, distribution, processing


def test_a_plugin_is_found(sandbox: Sandbox) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    assert sandbox.names() == ["linear", "good"]


@pytest.mark.parametrize(
    "source",
    [
        "import mergekit.merge_methods\nmethod = mergekit.merge_methods.MergeMethod('good')",
        "from mergekit import merge_methods\nmethod = merge_methods.MergeMethod('good')",
        "import mergekit.merge_methods as m\nmethod = m.MergeMethod('good')",
        "from mergekit.merge_methods import *\nmethod = MergeMethod('good')",
    ],
)
def test_a_plugin_may_import_mergekit_in_any_way(sandbox: Sandbox, source: str) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": source})
    assert sandbox.names() == ["linear", "good"]


@pytest.mark.parametrize("value", ["good.methods:Methods.good", " good.methods : Methods.good [extra]"])
def test_forms_of_an_entry_point(sandbox: Sandbox, value: str) -> None:
    source = METHOD.format("good") + "class Methods: good = method"
    sandbox.add("good", {"good": value}, {"good/__init__.py": "", "good/methods.py": source})
    assert sandbox.names() == ["linear", "good"]


def test_a_finder_that_was_there_before(sandbox: Sandbox) -> None:
    """As that of an editable install of mergekit may be."""
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    code = """
        import sys
        from importlib.machinery import PathFinder
        class Finder:
            def find_spec(self, name, path=None, target=None):
                return PathFinder.find_spec(name, path) if name.startswith("mergekit.") else None
        sys.meta_path.insert(0, Finder())
    """
    code = textwrap.dedent(code) + processing(sandbox.site) + NAMES
    assert sandbox.names(code, start=False) == ["linear", "good"]


def test_an_entry_point_of_another_name_than_the_method(sandbox: Sandbox) -> None:
    sandbox.add("odd", {"label": "odd:method"}, {"odd.py": METHOD.format("name")})
    result = sandbox.run()
    assert result.stdout == "linear name\n"
    assert result.stderr == (
        "mergekit-select: entry point 'label = odd:method' of odd 1.0 has registered a method of another "
        "name, 'name'. Recipes say merge_method: name; its author should give both the same name.\n"
    )


def test_two_plugins_want_one_name(sandbox: Sandbox) -> None:
    # By the distribution's name, whatever the order on disk: a recipe means the same method everywhere.
    sandbox.add("Beta", {"mean": "beta:method"}, {"beta.py": METHOD.format("mean")})
    sandbox.add("alpha", {"mean": "alpha:method"}, {"alpha.py": METHOD.format("mean")})
    result = sandbox.run(NAMES + "import alpha; print(m.registered_methods()[-1] is alpha.method)")
    assert result.stdout == "linear mean\nTrue\n"
    assert result.stderr == (
        "mergekit-select: skipped entry point 'mean = beta:method' of Beta 1.0: the name 'mean' is taken by "
        "entry point 'mean = alpha:method' of alpha 1.0, and stays with it. "
        "Update or uninstall Beta; its author can choose another name.\n"
    )


def test_the_same_method_twice(sandbox: Sandbox) -> None:
    source = METHOD.format("good") + "from mergekit.merge_methods import register\nregister(method)"
    sandbox.add("good", {"good": "good:method"}, {"good.py": source})
    sandbox.add("renamed", {"good": "good:method"}, {})
    assert sandbox.names() == ["linear", "good"]


def test_the_same_distribution_twice_on_the_path(sandbox: Sandbox) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")}, version="2.0")
    hidden = {"good": "good:method", "older": "older:method"}
    distribution(sandbox.site, "Good", hidden, {"good.py": "1/0", "older.py": METHOD.format("older")})
    assert sandbox.names() == ["linear", "good"]


def test_a_plugin_installed_while_the_program_runs(sandbox: Sandbox, tmp_path: Path) -> None:
    """As in a notebook: what was registered before is passed over, and what came since is registered."""
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    distribution(tmp_path / "more", "later", {"later": "later:method"}, {"later.py": METHOD.format("later")})
    code = f"""
        import sys
        import mergekit.merge_methods
        from mergekit_select._plugins import register_plugins
        sys.path.append({str(tmp_path / "more")!r})
        register_plugins()
    """
    assert sandbox.names(textwrap.dedent(code) + NAMES) == ["linear", "good", "later"]
