"""A plugin imported before mergekit has no method yet when mergekit asks: a line says what to import first."""

from __future__ import annotations

import textwrap

import pytest

from tests.plugins.support import METHOD, NAMES, SKIPPED, Sandbox

IN_A_PACKAGE = {
    "pack/__init__.py": "import mergekit.merge_methods\nfrom pack.methods import method\n",
    "pack/helper.py": "import mergekit.merge_methods\nname = 'good'\n",
    "pack/methods.py": "from pack.helper import name\n" + METHOD.format("good"),
}
IN_A_PLAIN_PACKAGE = IN_A_PACKAGE | {"pack/__init__.py": ""}
CASES = [
    ("good:method", {"good.py": METHOD.format("good")}, "good", "good"),
    ("pack:method", IN_A_PACKAGE, "pack", "pack"),
    ("pack.methods:method", IN_A_PACKAGE, "pack", "pack"),
    ("pack.methods:method", IN_A_PLAIN_PACKAGE, "pack.methods", "pack.methods"),
    ("pack.methods:method", IN_A_PLAIN_PACKAGE, "pack.helper", "pack.helper"),
    ("pack.methods:method", IN_A_PLAIN_PACKAGE, "pack.helper, pack.methods", "pack.helper"),
]


@pytest.mark.parametrize(("value", "modules", "first", "incomplete"), CASES)
def test_a_program_imports_the_plugin_first(
    sandbox: Sandbox, value: str, modules: dict[str, str], first: str, incomplete: str
) -> None:
    sandbox.add("good", {"good": value}, modules)
    code = f"""
        import {first}, sys
        from importlib.machinery import ModuleSpec
        imported = [module for name, module in sys.modules.items() if name.startswith(("pack", "good"))]
        assert {{type(module.__spec__) for module in imported}} == {{ModuleSpec}}
    """
    result = sandbox.run(textwrap.dedent(code) + NAMES)
    assert (result.returncode, result.stdout) == (0, "linear\n")
    assert result.stderr == SKIPPED.format("good", value, incomplete)


def test_whatever_the_distribution_is_called(sandbox: Sandbox) -> None:
    sandbox.add("zeta", {"zeta": "pack.methods:method"}, IN_A_PLAIN_PACKAGE)
    result = sandbox.run("import pack.helper\n" + NAMES)
    assert (result.returncode, result.stdout) == (0, "linear\n")
    assert result.stderr == SKIPPED.format("zeta", "pack.methods:method", "pack.helper")


def test_a_package_that_a_program_makes_itself_is_complete(sandbox: Sandbox) -> None:
    sandbox.add("good", {"good": "pack.methods:method"}, IN_A_PLAIN_PACKAGE)
    code = """
        import sys, types
        sys.modules["pack"] = types.ModuleType("pack")
        sys.modules["pack"].__path__ = ["pack"]
    """
    assert sandbox.names(textwrap.dedent(code) + NAMES) == ["linear", "good"]


@pytest.mark.parametrize(("value", "modules", "first", "_"), CASES)
def test_the_remedy_helps(sandbox: Sandbox, value: str, modules: dict[str, str], first: str, _: str) -> None:
    sandbox.add("good", {"good": value}, modules)
    assert sandbox.names(f"import mergekit.merge_methods, {first}\n" + NAMES) == ["linear", "good"]


def test_a_plugin_that_fails_when_a_program_imports_it(sandbox: Sandbox) -> None:
    source = "print('imported')\n" + METHOD.format("bad") + "1/0"
    sandbox.add("bad", {"bad": "broken:method"}, {"broken.py": source})
    code = """
        try:
            import broken
        except ZeroDivisionError as error:
            print(error)
    """
    result = sandbox.run(textwrap.dedent(code) + NAMES)
    assert result.stdout == "imported\ndivision by zero\nlinear\n"
    assert result.stderr == SKIPPED.format("bad", "broken:method", "broken")


def test_ctrl_c_while_a_program_imports_the_plugin(sandbox: Sandbox) -> None:
    source = METHOD.format("slow") + "raise KeyboardInterrupt"
    sandbox.add("slow", {"slow": "slow:method"}, {"slow.py": source})
    result = sandbox.run("import slow")
    assert result.returncode == -2
    assert result.stderr.startswith(SKIPPED.format("slow", "slow:method", "slow"))
    assert result.stderr.count("mergekit-select:") == 1
