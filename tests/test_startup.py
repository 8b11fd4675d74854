"""The startup files: what they cost, when they register, and that nothing breaks where they cannot.

Each test runs a fresh interpreter in a site directory of its own: the package and its startup files, read as
`site` reads those in site-packages, beside a stand-in for mergekit. So nothing here needs mergekit or torch.
"""

import os
import pkgutil
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import mergekit_select
from mergekit_select import _startup

INSTALLED = Path(mergekit_select.__file__).parents[1]
PTH = INSTALLED / "mergekit_select.pth"
START = INSTALLED / "mergekit_select.start"

# Stands in for what would register: each test of the waiting only asks how often, and when.
STUB = """
import sys, types
plugins = types.ModuleType("mergekit_select._plugins")
plugins.register_plugins = lambda: print("registered")
sys.modules[plugins.__name__] = plugins
"""


@pytest.fixture
def site_dir(tmp_path: Path) -> Path:
    """A site directory with the package and its startup files."""
    folder = tmp_path / "site"
    package = folder / "mergekit_select"
    package.mkdir(parents=True)
    for name in ("__init__.py", "_startup.py"):
        shutil.copy(INSTALLED / "mergekit_select" / name, package)
    shutil.copy(PTH, folder)
    shutil.copy(START, folder)
    return folder


@pytest.fixture
def mergekit(tmp_path: Path) -> Path:
    """A folder with a package mergekit that says when its merge methods are imported."""
    package = tmp_path / "stand-in" / "mergekit" / "merge_methods"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("print('executed')\nclass Method: pass\n")
    return package.parents[1]


def python(
    code: str, *path: Path, options: Sequence[str] = ("-S",), variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, without what the test's own environment would add."""
    environment = {key: os.environ[key] for key in os.environ if not key.startswith(("PYTHON", "MERGEKIT"))}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env=environment | dict(variables or {}),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


def output(code: str, site_dir: Path, *path: Path, stub: bool = True, **variables: str) -> list[str]:
    """The lines printed by code that runs after the site directory was processed; nothing may go wrong."""
    start = f"import site; site.addsitedir({str(site_dir)!r})\n"
    result = python((STUB if stub else "") + start + textwrap.dedent(code), *path, variables=variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


# ---- the interpreter's start


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


HEAVY = """
import sys
print(*{"torch", "mergekit", "importlib.metadata", "mergekit_select._startup"} & set(sys.modules))
"""


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


# ---- the startup files


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


# ---- waiting for mergekit


def test_registers_once_when_mergekit_has_been_imported(site_dir: Path, mergekit: Path) -> None:
    code = """
        import mergekit
        print("not yet")
        import mergekit.merge_methods
        import mergekit.merge_methods
    """
    assert output(code, site_dir, mergekit) == ["not yet", "executed", "registered"]


def test_leaves_no_trace_in_the_import_system(site_dir: Path, mergekit: Path) -> None:
    code = """
        import copy, importlib.resources, inspect, pickle, sys
        import mergekit.merge_methods as module
        from importlib.machinery import ModuleSpec, SourceFileLoader
        assert not [finder for finder in sys.meta_path if "mergekit" in type(finder).__module__]
        assert type(module.__spec__) is ModuleSpec and type(module.__loader__) is SourceFileLoader
        assert module.__spec__.loader is module.__loader__
        assert module.__spec__.loader.exec_module.__func__ is SourceFileLoader.exec_module
        assert inspect.getsource(module).startswith("print('executed')")
        assert importlib.resources.files(module).joinpath("__init__.py").is_file()
        assert pickle.loads(pickle.dumps(module.Method)) is module.Method
        assert module.__spec__ == copy.copy(module.__spec__)
    """
    assert output(code, site_dir, mergekit) == ["executed", "registered"]


def test_looking_for_the_spec_does_not_count_as_an_import(site_dir: Path, mergekit: Path) -> None:
    code = """
        import copy, importlib.util
        spec = importlib.util.find_spec("mergekit.merge_methods")
        assert spec.loader.get_source("mergekit.merge_methods").startswith("print('executed')")
        assert copy.copy(spec.loader).is_package("mergekit.merge_methods")
        assert not hasattr(spec.loader, "anything")
        print("found")
        import mergekit.merge_methods
    """
    assert output(code, site_dir, mergekit) == ["found", "executed", "registered"]


def test_a_spec_executed_by_hand_registers_too(site_dir: Path, mergekit: Path) -> None:
    code = """
        import importlib.util, sys
        spec = importlib.util.find_spec("mergekit.merge_methods")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print("lazy")
        module.Method
    """
    assert output(code, site_dir, mergekit) == ["lazy", "executed", "registered"]


def test_reload_is_left_alone(site_dir: Path, mergekit: Path) -> None:
    code = """
        import importlib, mergekit.merge_methods
        importlib.reload(mergekit.merge_methods)
    """
    assert output(code, site_dir, mergekit) == ["executed", "registered", "executed"]


def test_mergekit_imported_before_the_site_directory(site_dir: Path, mergekit: Path) -> None:
    code = f"import mergekit.merge_methods, site; site.addsitedir({str(site_dir)!r})"
    assert python(STUB + code, mergekit).stdout.split() == ["executed", "registered"]


def test_site_directory_processed_twice(site_dir: Path, mergekit: Path) -> None:
    code = f"""
        site.addsitedir({str(site_dir)!r})
        assert [type(finder).__module__ for finder in sys.meta_path].count("mergekit_select._startup") == 1
        import mergekit.merge_methods
    """
    assert output(code, site_dir, mergekit) == ["executed", "registered"]


def test_without_mergekit_imports_fail_as_ever(site_dir: Path) -> None:
    code = """
        for name in "mergekit", "mergekit.merge_methods", "nothing_of_that_name":
            try:
                __import__(name)
            except ModuleNotFoundError as error:
                print(error)
    """
    assert output(code, site_dir) == [
        "No module named 'mergekit'",
        "No module named 'mergekit'",
        "No module named 'nothing_of_that_name'",
    ]


def test_mergekit_without_merge_methods(site_dir: Path, mergekit: Path) -> None:
    shutil.rmtree(mergekit / "mergekit" / "merge_methods")
    code = """
        try:
            import mergekit.merge_methods
        except ModuleNotFoundError as error:
            print(error)
    """
    assert output(code, site_dir, mergekit) == ["No module named 'mergekit.merge_methods'"]


def test_waits_on_after_an_import_of_mergekit_that_failed(site_dir: Path, mergekit: Path) -> None:
    module = mergekit / "mergekit" / "merge_methods" / "__init__.py"
    module.write_text("import sys\nif 'go' not in vars(sys): raise ImportError('no')\nprint('executed')")
    code = """
        try:
            import mergekit.merge_methods
        except ImportError as error:
            print(error)
        sys.go = True
        import mergekit.merge_methods
    """
    assert output(code, site_dir, mergekit) == ["no", "executed", "registered"]


def test_mergekit_in_an_archive(site_dir: Path, mergekit: Path, tmp_path: Path) -> None:
    # zipimport has one loader for the whole archive.
    with zipfile.ZipFile(tmp_path / "mergekit.zip", "w") as archive:
        for file in mergekit.rglob("*.py"):
            archive.write(file, file.relative_to(mergekit))
        archive.writestr("mergekit/other.py", "print('other')")
    code = """
        import mergekit.other, mergekit.merge_methods
        assert mergekit.merge_methods.__loader__ is mergekit.merge_methods.__spec__.loader
        assert type(mergekit.merge_methods.__loader__) is type(mergekit.other.__loader__)
    """
    assert output(code, site_dir, tmp_path / "mergekit.zip") == ["other", "executed", "registered"]


def test_loaders_that_cannot_execute_are_left_as_they_are(site_dir: Path) -> None:
    code = """
        from importlib.machinery import ModuleSpec
        from mergekit_select._startup import _finder

        class LoadModuleOnly:
            def load_module(self, fullname): raise AssertionError

        class FindsThat:
            def find_spec(self, fullname, path=None, target=None):
                return ModuleSpec(fullname, loader)

        sys.meta_path.insert(1, FindsThat())
        for loader in LoadModuleOnly(), None:
            assert _finder.find_spec("mergekit.merge_methods").loader is loader
    """
    assert output(code, site_dir) == []


@pytest.mark.parametrize("position", [0, 1, 99])
def test_a_finder_that_asks_all_the_others(site_dir: Path, mergekit: Path, position: int) -> None:
    code = f"""
        class AsksEverybody:
            def find_spec(self, fullname, path=None, target=None):
                others = [finder for finder in sys.meta_path if finder is not self]
                specs = (finder.find_spec(fullname, path, target) for finder in others)
                return next(filter(None, specs), None)

        sys.meta_path.insert({position}, AsksEverybody())
        import mergekit.merge_methods
    """
    assert output(code, site_dir, mergekit) == ["executed", "registered"]


def test_a_finder_of_the_old_kind(site_dir: Path, mergekit: Path) -> None:
    code = """
        from mergekit_select._startup import _finder
        class Old:  # find_module went with Python 3.12
            def find_module(self, fullname, path=None): raise AssertionError
        import mergekit
        sys.meta_path.insert(1, Old())
        spec = _finder.find_spec("mergekit.merge_methods", mergekit.__path__)
        assert spec.name == "mergekit.merge_methods"
    """
    assert output(code, site_dir, mergekit) == []


def test_threads_that_import_at_once(site_dir: Path, mergekit: Path) -> None:
    module = mergekit / "mergekit" / "merge_methods" / "__init__.py"
    module.write_text("import time\ntime.sleep(0.2)\nprint('executed')\ndone = True\n")
    code = """
        import threading
        def use():
            import mergekit.merge_methods
            assert mergekit.merge_methods.done
        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    assert output(code, site_dir, mergekit) == ["executed", "registered"]


# ---- turned off, broken, interrupted


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


FAILURE = (
    "mergekit-select: no merge methods of other packages are registered: {}. mergekit runs without them. "
    "Install what fits together: pip install --upgrade mergekit-select 'mergekit>=0.1.5,<0.2'; or set "
    "MERGEKIT_SELECT_DISABLE=1.\n"
)


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
