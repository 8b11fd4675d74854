"""After the interpreter's start: nothing happens until mergekit is imported, and then once."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from tests.plugins.support import STUB, output, python


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
