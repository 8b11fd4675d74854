"""A broken plugin costs one line that names it, and neither another plugin nor the program."""

from __future__ import annotations

import re
import sys
import textwrap

import pytest

from tests.plugins.support import METHOD, NAMES, STAND_IN, WARNING, Sandbox, distribution

UNPRINTABLE = "<exception str() failed>" if sys.version_info >= (3, 11) else "<unprintable Error object>"

BROKEN = {
    "raises": (
        "broken:method",
        "raise RuntimeError('two\\n lines')",
        "importing broken raised RuntimeError: two lines. "
        'Update or uninstall bad; python -c "import broken" shows where it fails.',
    ),
    "raises an error that has no text": (
        "broken:method",
        "class Error(Exception):\n    def __str__(self): raise ValueError\nraise Error",
        f"importing broken raised broken.Error: {UNPRINTABLE}. "
        'Update or uninstall bad; python -c "import broken" shows where it fails.',
    ),
    "module missing": (
        "nowhere:method",
        "",
        "importing nowhere raised ModuleNotFoundError: No module named 'nowhere'. "
        'Update or uninstall bad; python -c "import nowhere" shows where it fails.',
    ),
    "names nothing": (
        "broken:nothing.at_all",
        "",
        "looking up nothing.at_all in broken raised AttributeError: module 'broken' has no attribute "
        "'nothing'. Update or uninstall bad; its author should correct the entry point.",
    ),
    "a module": (
        "broken",
        "",
        "it must lead to a mergekit MergeMethod that has a name, not to an object of type module. "
        "Update or uninstall bad; its author can make one with mergekit.merge_methods.merge_method.",
    ),
    "a function": (
        "broken:method",
        "def method(): ...",
        "it must lead to a mergekit MergeMethod that has a name, not to an object of type function. "
        "Update or uninstall bad; its author can make one with mergekit.merge_methods.merge_method.",
    ),
    "a class": (
        "broken:Method",
        "from mergekit.merge_methods import MergeMethod\nclass Method(MergeMethod): ...",
        "it must lead to a mergekit MergeMethod that has a name, not to an object of type type. "
        "Update or uninstall bad; its author can make one with mergekit.merge_methods.merge_method.",
    ),
    "no name": (
        "broken:method",
        METHOD.format(None) + "class Odd(MergeMethod): ...\nmethod.__class__ = Odd",
        "it must lead to a mergekit MergeMethod that has a name, not to an object of type broken.Odd. "
        "Update or uninstall bad; its author can make one with mergekit.merge_methods.merge_method.",
    ),
    "no spec": (
        "broken:method",
        METHOD.format("x") + "del method.spec",
        "looking up method in broken raised AttributeError: 'MergeMethod' object has no attribute 'spec'. "
        "Update or uninstall bad; its author should correct the entry point.",
    ),
    "no module:object": (
        "broken, method",
        "",
        "its value must read package.module:method. "
        "Update or uninstall bad; its author should correct the entry point.",
    ),
    "name taken": (
        "broken:method",
        METHOD.format("linear"),
        "the name 'linear' is taken by mergekit.merge_methods, and stays with it. "
        "Update or uninstall bad; its author can choose another name.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_costs_one_line(sandbox: Sandbox, case: str) -> None:
    value, source, text = BROKEN[case]
    sandbox.add("bad", {"label": value}, {"broken.py": source})
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    result = sandbox.run()
    assert result.stderr == f"mergekit-select: skipped entry point 'label = {value}' of bad 1.0: {text}\n"
    assert (result.returncode, result.stdout) == (0, "linear good\n")


def test_a_method_that_mergekit_refuses(sandbox: Sandbox) -> None:
    module = sandbox.site / "mergekit" / "merge_methods" / "__init__.py"
    refusing = """
known = register
def register(method):
    if method.spec.name == "bad": raise ValueError("it has no contract")
    known(method)
"""
    module.write_text(STAND_IN + refusing)
    sandbox.add("bad", {"bad": "broken:method"}, {"broken.py": METHOD.format("bad")})
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    result = sandbox.run()
    assert (result.returncode, result.stdout) == (0, "linear good\n")
    assert result.stderr == (
        "mergekit-select: skipped entry point 'bad = broken:method' of bad 1.0: "
        "registering it raised ValueError: it has no contract. "
        "Update or uninstall bad; its author should correct it.\n"
    )


@pytest.mark.parametrize("option", ["error", "ignore"])
def test_that_line_depends_on_no_warning_filter(sandbox: Sandbox, option: str) -> None:
    sandbox.add("bad", {"bad": "broken:method"}, {"broken.py": "1/0"})
    result = sandbox.run(options=("-W", option))
    assert result.stdout == "linear\n"
    assert result.stderr.startswith("mergekit-select: skipped entry point 'bad = broken:method' of bad 1.0: ")
    assert result.stderr.count("\n") == 1


def test_problems_are_data_too_and_said_once(sandbox: Sandbox) -> None:
    sandbox.add("bad", {"bad": "broken:method"}, {"broken.py": "print('imported')\n1/0"})
    code = """
        from mergekit_select import _plugins
        _plugins.register_plugins()
        _plugins.register_plugins()
        import mergekit.merge_methods
        print(*_plugins.problems(), sep="\\n")
    """
    result = sandbox.run(code)
    assert result.stdout == "imported\n" + result.stderr
    assert result.stderr.count("\n") == 1


def test_metadata_that_cannot_be_read(sandbox: Sandbox) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    group = b"[mergekit.merge_methods]\n"
    (sandbox.add("binary", {}, {}) / "entry_points.txt").write_bytes(group + b"x = \xff\xfe\n")
    (sandbox.add("empty", {}, {}) / "entry_points.txt").unlink()
    (sandbox.add("nothing", {}, {}) / "entry_points.txt").write_bytes(group + b"nothing\n")
    (sandbox.add("nameless", {"x": "x:x"}, {}) / "METADATA").unlink()
    result = sandbox.run()
    assert (result.returncode, result.stdout) == (0, "linear good\n")
    # What exactly was raised is Python's text, and differs between versions.
    lines = result.stderr.splitlines()
    texts = [re.sub("raised .*[.] Install", "raised ... Install", line) for line in lines]
    assert texts == 2 * [
        f"mergekit-select: skipped a distribution with merge methods in {sandbox.plugins.resolve()}: "
        "reading its metadata raised ... Install it again."
    ]


def test_metadata_that_say_nothing_of_merge_methods_are_not_read(sandbox: Sandbox) -> None:
    info = sandbox.add("other", {}, {})
    (info / "entry_points.txt").unlink()
    (info / "METADATA").unlink()
    assert sandbox.names() == ["linear"]


def test_ctrl_c_stops_the_program(sandbox: Sandbox) -> None:
    sandbox.add("slow", {"slow": "slow:method"}, {"slow.py": "raise KeyboardInterrupt"})
    result = sandbox.run()
    assert (result.returncode, result.stdout) == (-2, "")
    assert "mergekit-select:" not in result.stderr


def test_a_plugin_may_not_end_the_program(sandbox: Sandbox) -> None:
    """The merge would end with 0, as if it had been done."""
    sandbox.add("quitter", {"quit": "quitter:method"}, {"quitter.py": "import sys\nsys.exit(0)"})
    result = sandbox.run()
    assert (result.returncode, result.stdout) == (0, "linear\n")
    assert "importing quitter raised SystemExit: 0" in result.stderr


def test_a_second_try_after_ctrl_c(sandbox: Sandbox) -> None:
    source = "import sys\nif not hasattr(sys, 'go'): raise KeyboardInterrupt\n"
    sandbox.add("slow", {"slow": "slow:method"}, {"slow.py": source + METHOD.format("slow")})
    code = """
        import sys
        try:
            import mergekit.merge_methods
        except KeyboardInterrupt:
            sys.go = True
    """
    assert sandbox.names(textwrap.dedent(code) + NAMES) == ["linear", "slow"]


def test_a_mergekit_too_old_for_plugins(sandbox: Sandbox) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": "1/0"})
    module = sandbox.site / "mergekit" / "merge_methods" / "__init__.py"
    module.write_text("def get(name): ...")
    result = sandbox.run("import mergekit.merge_methods; print('merges')")
    assert (result.returncode, result.stdout) == (0, "merges\n")
    assert result.stderr.startswith(
        "mergekit-select: no merge methods of other packages are registered: "
        "ImportError: the mergekit installed has no mergekit.merge_methods.MergeMethod. mergekit runs without"
    )
    assert result.stderr.count("\n") == 1


def test_what_an_interrupted_uninstall_leaves(sandbox: Sandbox) -> None:
    info = sandbox.add("gone", {"gone": "gone:method"}, {})
    info.rename(info.with_name("~one-1.0.dist-info"))
    # In the folder behind it, so that it is read after it.
    distribution(sandbox.site, "good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    assert sandbox.names() == ["linear", "good"]


def test_the_documented_warning(sandbox: Sandbox) -> None:
    entries = {"median": "mergekit_median:median"}
    modules = {"mergekit_median.py": "raise ModuleNotFoundError(\"No module named 'scipy'\")"}
    sandbox.add("mergekit-median", entries, modules)
    assert sandbox.run().stderr == WARNING
