"""Fresh interpreters, and site directories with the package and stand-ins for mergekit and for plugins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import mergekit_select

HERE = Path(__file__).parent
INSTALLED = Path(mergekit_select.__file__).parents[1]
DOCUMENT = Path(__file__).parents[2] / "docs" / "plugins.md"
PTH = INSTALLED / "mergekit_select.pth"
START = INSTALLED / "mergekit_select.start"

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
PYPROJECT, MODULE, RECIPE, PROGRAM, PRINTED, WARNING, _, IMPORT = (text for _, text in BLOCKS)

STAND_IN = """
class Spec:
    def __init__(self, name): self.name = name
class MergeMethod:
    def __init__(self, name): self.spec = Spec(name)
_methods = {}
def register(method):
    if method.spec.name in _methods: raise ValueError(f"{method.spec.name} is registered")
    _methods[method.spec.name] = method
def registered_methods(): return tuple(_methods.values())
register(MergeMethod("linear"))
"""
# Stands in for what would register: each test of the waiting only asks how often, and when.
STUB = """
import sys, types
plugins = types.ModuleType("mergekit_select._plugins")
plugins.register_plugins = lambda: print("registered")
sys.modules[plugins.__name__] = plugins
"""

# What is said of an entry point of a distribution of the same name, its value, and the module that is incomplete.
SKIPPED = (
    "mergekit-select: skipped entry point '{0} = {1}' of {0} 1.0: {2} was imported before mergekit, and is not "
    "complete when mergekit asks for its methods. Update or uninstall {0}; import mergekit.merge_methods first.\n"
)
METHOD = "from mergekit.merge_methods import MergeMethod\nmethod = MergeMethod({!r})\n"
NAMES = "import mergekit.merge_methods as m; print(*(known.spec.name for known in m.registered_methods()))\n"


def distribution(
    folder: Path,
    name: str,
    entries: Mapping[str, str],
    modules: Mapping[str, str],
    version: str = "1.0",
) -> Path:
    """Lay a distribution with its modules into the folder, as an installer would."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[mergekit.merge_methods]", *lines, ""]))
    for path, source in modules.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)
    return info


def environment(*path: Path, **variables: str) -> dict[str, str]:
    """The environment of the test, less what would make a difference to the interpreter it starts."""
    kept = {key: os.environ[key] for key in os.environ if not key.startswith(("PYTHON", "MERGEKIT"))}
    fixed = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    return kept | fixed | {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables


def python(
    code: str, *path: Path, options: Sequence[str] = ("-S",), cwd: Path = HERE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, without what the test's own environment would add."""
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env=environment(*path, **variables),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def install(folder: Path, *modules: str) -> Path:
    """Lay modules of the package and its startup files into a site directory."""
    (folder / "mergekit_select").mkdir(parents=True)
    for name in modules:
        shutil.copy(INSTALLED / "mergekit_select" / name, folder / "mergekit_select")
    shutil.copy(PTH, folder)
    shutil.copy(START, folder)
    return folder


def processing(site_dir: Path) -> str:
    """Code that processes a site directory as the interpreter's start does."""
    return f"import site; site.addsitedir({str(site_dir)!r})\n"


class Sandbox:
    """A site directory with the package and a stand-in for mergekit, and a folder for plugins in front."""

    def __init__(self, folder: Path) -> None:
        self.site = folder / "site"
        self.plugins = folder / "plugins"
        self.plugins.mkdir()
        install(self.site, "__init__.py", "_startup.py", "_plugins.py", "_entry_points.py", "errors.py")
        (self.site / "mergekit" / "merge_methods").mkdir(parents=True)
        (self.site / "mergekit" / "__init__.py").touch()
        (self.site / "mergekit" / "merge_methods" / "__init__.py").write_text(STAND_IN)

    def add(self, name: str, entries: Mapping[str, str], modules: Mapping[str, str], version: str = "1.0") -> Path:
        return distribution(self.plugins, name, entries, modules, version)

    def run(
        self, code: str = NAMES, options: Sequence[str] = (), start: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        code = (processing(self.site) if start else "") + textwrap.dedent(code)
        return python(code, self.plugins, self.site, options=("-S", *options), cwd=self.plugins, **variables)

    def names(self, code: str = NAMES, start: bool = True, **variables: str) -> list[str]:
        """What the code prints, where nothing is to be said."""
        result = self.run(code, start=start, **variables)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.split()


def output(code: str, site_dir: Path, *path: Path, **variables: str) -> list[str]:
    """The lines printed by code that runs after the site directory was processed; nothing may go wrong."""
    program = STUB + processing(site_dir) + textwrap.dedent(code)
    result = python(program, *path, options=("-S",), cwd=HERE, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()
