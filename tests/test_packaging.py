"""What `pip install` leaves in an environment, and `pip uninstall` takes away again.

Wheels are built from a copy of the checkout, and installed into virtual environments that borrow mergekit and
torch from the one that runs the tests, through a path in a .pth file. Python reads no startup files there, so
those of the running environment cannot stand in for what is tested.
"""

import configparser
import email
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from mergekit_select.selection import kernel_c

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "merge_methods" / "mergekit_select"
LIBRARY = kernel_c.LIBRARY.name
HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang"))) and "CC" not in os.environ
OWN = ["parameter_selection", "parameter_selection_resampling"]
STARTUP = {"mergekit_select.pth", "mergekit_select.start"}


def run(command: Sequence[str | Path], folder: Path, **variables: str) -> str:
    ours = ("PYTHON", "MERGEKIT", "PIP_")
    kept = {key: os.environ[key] for key in os.environ if not key.startswith(ours)}
    result = subprocess.run(
        command,
        env=kept | {"PYTHONDONTWRITEBYTECODE": "1"} | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def pip(*arguments: str | Path, python: Path | None = None, folder: Path = ROOT, **variables: str) -> str:
    target: list[str | Path] = ["--python", python] if python else []
    options = ["--disable-pip-version-check", "--quiet"]
    return run([sys.executable, "-m", "pip", *options, *target, *arguments], folder, **variables)


def build(command: str, source: Path, place: Path, **variables: str) -> Path:
    """Build a wheel, or a source distribution, in this environment and without network."""
    if command == "sdist":
        run([sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", place], source)
    else:
        options = ["--no-build-isolation", "--no-deps", "--no-index"]
        pip("wheel", *options, "--wheel-dir", place, source, python=None, folder=place, **variables)
    (built,) = place.iterdir()
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    no_caches = shutil.ignore_patterns("__pycache__", "libkernel.*")
    shutil.copytree(SOURCE.parent, folder / SOURCE.parent.name, ignore=no_caches)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def plain_wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as where there is no C compiler."""
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"), CC=str(checkout / "no-such-compiler"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


compiled = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")


# ---- the wheel


def distribution(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2])


@pytest.mark.parametrize("form", [pytest.param("wheel", marks=compiled), "plain_wheel"])
def test_wheel_holds_the_package_the_startup_files_and_metadata(form: str, request: pytest.FixtureRequest) -> None:
    wheel: Path = request.getfixturevalue(form)
    info = distribution(wheel) + ".dist-info"
    files = [path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file()]
    modules = {f"mergekit_select/{path.as_posix()}" for path in files if path.suffix == ".py"}
    described = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    metadata = {f"{info}/{name}" for name in described}
    library = {f"mergekit_select/selection/{LIBRARY}"} if form == "wheel" else set()
    recipes = {f"mergekit_select/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    data = {"mergekit_select/py.typed", "mergekit_select/provenance/schema.json"}
    assert set(contents(wheel)) == modules | data | recipes | STARTUP | metadata | library


@compiled
def test_wheel_with_a_kernel_is_for_one_platform_and_every_python(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"{distribution(wheel)}-py3-none-{platform}.whl"
    assert b"Root-Is-Purelib: false" in contents(wheel)[f"{distribution(wheel)}.dist-info/WHEEL"]


def test_wheel_without_a_kernel_is_for_every_platform(plain_wheel: Path) -> None:
    assert plain_wheel.name == f"{distribution(plain_wheel)}-py3-none-any.whl"
    assert b"Root-Is-Purelib: true" in contents(plain_wheel)[f"{distribution(plain_wheel)}.dist-info/WHEEL"]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "the C compiler no-such-compiler cannot be run: "),
        (f"{sys.executable} -c 'raise SystemExit(3)'", "failed with status 3: it says nothing"),
    ],
)
def test_why_there_is_no_kernel_is_said_in_one_line(checkout: Path, tmp_path: Path, compiler: str, reason: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    environment = {**os.environ, "CC": compiler}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    line, built = done.stderr.splitlines()
    assert built.endswith("-py3-none-any.whl")
    assert line.startswith("mergekit-select is installed without its compiled kernel: ")
    assert reason in line


@compiled
def test_the_same_source_gives_the_same_library(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    assert contents(build("wheel", checkout, tmp_path)) == contents(wheel)


def test_startup_files_come_through_unchanged(wheel: Path) -> None:
    files = contents(wheel)
    for name in STARTUP:
        assert files[name] == (SOURCE.parent / name).read_bytes()


@pytest.mark.parametrize("name", sorted(STARTUP))
def test_security_md_prints_the_startup_files(name: str, wheel: Path) -> None:
    _, _, rest = (ROOT / "SECURITY.md").read_text("utf-8").partition(f"This is `{name}`:")
    printed = rest.split("```\n")[1]
    assert contents(wheel)[name].decode() == printed
    assert printed.count("\n") == 3


def test_metadata(wheel: Path) -> None:
    files = contents(wheel)
    texts = {
        name: files[f"{distribution(wheel)}.dist-info/{name}"].decode() for name in ("METADATA", "entry_points.txt")
    }
    metadata = email.message_from_string(texts["METADATA"])
    assert metadata["Name"] == "mergekit-select"
    assert metadata["Version"] == wheel.name.split("-")[1]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "mergekit<0.2,>=0.1.5" in metadata.get_all("Requires-Dist", [])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    entries = configparser.ConfigParser()
    entries.read_string(texts["entry_points.txt"])
    group = entries["mergekit.merge_methods"]
    assert dict(group) == {name: f"mergekit_select.methods:{name}" for name in OWN}


def test_source_distribution_gives_the_same_wheel(
    checkout: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = build("sdist", checkout, tmp_path_factory.mktemp("sdist"))
    assert archive.name == f"{distribution(wheel)}.tar.gz"
    again = build("wheel", archive, tmp_path_factory.mktemp("wheel"))
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


@pytest.mark.parametrize("command", ["wheel", "sdist"])
def test_two_builds_are_one_digest(command: str, checkout: Path, tmp_path: Path) -> None:
    """In another folder, from files of other times, in another time zone."""
    other = tmp_path / "another place" / "checkout"
    shutil.copytree(checkout, other)
    for number, path in enumerate(sorted(other.rglob("*"))):
        os.utime(path, (10**9 + number, 10**9 + number))
    built = []
    for number, source in enumerate((checkout, other)):
        (tmp_path / str(number)).mkdir()
        built.append(build(command, source, tmp_path / str(number), TZ="UTC" if number else "Asia/Tokyo"))
    assert built[0].name == built[1].name
    assert built[0].read_bytes() == built[1].read_bytes()


def test_building_asks_no_network(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    """In a network without devices, where the system allows one; everywhere with a proxy that is not there."""
    alone = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    command: list[str | Path] = [
        *alone,
        sys.executable,
        "-m",
        "pip",
        "wheel",
        *options,
        "--wheel-dir",
        tmp_path,
        checkout,
    ]
    run(command, tmp_path, **nowhere)
    (again,) = tmp_path.glob("*.whl")
    assert contents(again) == contents(wheel)


# ---- installed


class Environment:
    """A virtual environment without pip and, unless it borrows, without a single package."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.folder = folder
        scripts = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = scripts / Path(sys.executable).name
        self.python = self.python if self.python.exists() else scripts / "python"
        self.site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        self.loan = self.site_packages / "borrowed.pth"
        (self.site_packages / "kept.txt").touch()  # pip would remove the folder along with the last package

    def borrow(self) -> None:
        """Make the packages of the running environment importable."""
        paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        self.loan.write_text("\n".join(paths) + "\n")

    def give_back(self) -> None:
        self.loan.unlink()

    def files(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")}

    def run(self, code: str, **variables: str) -> str:
        return run([self.python, "-c", code], self.folder, HF_HUB_OFFLINE="1", **variables)


STARTED = """
import sys
print([type(finder).__module__ for finder in sys.meta_path].count("mergekit_select._startup"))
"""
# What `mergekit-pytorch` runs is mergekit.scripts.merge_raw_pytorch:main, after just this import.
METHODS = """
from mergekit.scripts.merge_raw_pytorch import merge_methods
import mergekit_select
print(*(method.spec.name for method in merge_methods.registered_methods()))
print(mergekit_select.__file__)
print(mergekit_select.selection.kernel_name())
"""
SHOW = "from mergekit_select.cli import main; main(['recipes', 'show', 'select'])"


@pytest.mark.parametrize("form", ["wheel", "plain_wheel", "editable"])
def test_install_and_uninstall(form: str, request: pytest.FixtureRequest, checkout: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    before = environment.files()
    if form != "editable":
        pip("install", "--no-deps", "--no-index", request.getfixturevalue(form), python=environment.python)
        home = environment.site_packages
        beside: set[str] = set()
    else:
        # Borrowed for hatchling. With it comes the running environment's mergekit-select: not to be touched.
        environment.borrow()
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        pip("install", *options, "--editable", checkout, python=environment.python)
        environment.give_back()
        home = checkout / "merge_methods"
        beside = {"_editable_impl_mergekit_select.pth"}
    installed = {path.name for path in environment.site_packages.iterdir()}
    assert {name for name in installed if name.endswith((".pth", ".start"))} == STARTUP | beside
    assert environment.run(STARTED) == "1\n"

    environment.borrow()
    names, place, kernel = environment.run(METHODS).splitlines()
    recipe = environment.run(SHOW)
    environment.give_back()
    assert names.split()[-2:] == OWN
    assert place == str(home / "mergekit_select" / "__init__.py")
    assert kernel == ("c" if HAS_COMPILER and form != "plain_wheel" else "torch")
    assert recipe == (ROOT / "recipes" / "select.yml").read_text("utf-8")
    assert (home / "mergekit_select" / "recipes").is_dir() == (form != "editable")

    pip("uninstall", "--yes", "mergekit-select", python=environment.python)
    assert environment.files() == before
    assert environment.run(STARTED) == "0\n"


def test_borrowed_packages_bring_no_startup_file(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.borrow()
    assert environment.run(STARTED) == "0\n"


def test_target_folder_starts_nothing_and_works_by_import(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    folder = tmp_path / "target"
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel, python=environment.python)
    environment.borrow()
    code = "import mergekit_select.methods\nfrom mergekit.merge_methods import registered_methods\n"
    code += "print(*(method.spec.name for method in registered_methods()), mergekit_select.__file__)"
    started, methods = environment.run(STARTED + code, PYTHONPATH=str(folder)).splitlines()
    assert started == "0"
    assert methods.split()[-3:] == [*OWN, str(folder / "mergekit_select" / "__init__.py")]
