"""mergekit's own commands and in-memory API with plugins: the documented one, broken ones, and ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.plugins.support import (
    DOCUMENT,
    IMPORT,
    INSTALLED,
    MODULE,
    NAMES,
    PRINTED,
    PROGRAM,
    PYPROJECT,
    RECIPE,
    distribution,
    environment,
)
from tests.support.models import SUB_MODELS, write_llamas
from tests.support.recipes import METHODS, RESAMPLING, Recipe, recipe, written

BROKEN_FOR_REAL = [
    "mergekit-select: skipped entry point 'other = bad_name:other' of bad-name 1.0: "
    "the name 'linear' is taken by mergekit.merge_methods.linear, and stays with it. "
    "Update or uninstall bad-name; its author can choose another name.",
    "mergekit-select: skipped entry point 'nothing = bad_nothing:nothing' of bad-nothing 1.0: "
    "looking up nothing in bad_nothing raised "
    "AttributeError: module 'bad_nothing' has no attribute 'nothing'. "
    "Update or uninstall bad-nothing; its author should correct the entry point.",
    "mergekit-select: skipped entry point 'raises = bad_raises:method' of bad-raises 1.0: "
    "importing bad_raises raised ModuleNotFoundError: No module named 'nothing_of_that_name'. "
    'Update or uninstall bad-raises; python -c "import bad_raises" shows where it fails.',
    "mergekit-select: skipped entry point 'text = bad_type:text' of bad-type 1.0: "
    "it must lead to a mergekit MergeMethod that has a name, not to an object of type str. "
    "Update or uninstall bad-type; its author can make one with mergekit.merge_methods.merge_method.",
]


def local(method: str, file: str = "", **keys: Any) -> Recipe:
    """A recipe of the models in ./models, or of a file in each."""
    models = [f"./models/{name}{file}" for name in SUB_MODELS]
    return recipe(method, f"./models/base{file}", models, dtype="float32", **keys)


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin of docs/plugins.md, built with pip and unpacked."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "mergekit_median.py").write_text(MODULE)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "dist", "."]
    subprocess.run(command, check=True, env=environment(), cwd=folder)
    (wheel,) = (folder / "dist").iterdir()
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plugin of each broken kind."""
    folder = tmp_path_factory.mktemp("broken")
    method = (
        "import torch\nfrom mergekit.merge_methods import TensorBatch, merge_method\n"
        "@merge_method(name='linear')\ndef other(batch: TensorBatch) -> torch.Tensor: ...\n"
    )
    missing = "import nothing_of_that_name"
    distribution(folder, "bad-name", {"other": "bad_name:other"}, {"bad_name.py": method})
    distribution(folder, "bad-nothing", {"nothing": "bad_nothing:nothing"}, {"bad_nothing.py": ""})
    distribution(folder, "bad-raises", {"raises": "bad_raises:method"}, {"bad_raises.py": missing})
    distribution(folder, "bad-type", {"text": "bad_type:text"}, {"bad_type.py": "text = 'linear'"})
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and recipes, and later with what the commands make of them."""
    folder = tmp_path_factory.mktemp("work")
    write_llamas(folder / "models", layers=1, vocabulary=16, dtype=torch.float32)
    (folder / "median.yml").write_text(RECIPE)
    written(folder / "multi.yml", *(local(name, name=f"by_{name}") for name in METHODS))
    written(folder / "pytorch.yml", local(RESAMPLING, "/model.safetensors"))
    return folder


Results = dict[str, "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def results(work: Path, documented: Path, broken: Path) -> Results:
    """Every process that imports mergekit, two at a time: most of what they do is to import torch."""
    script = Path(sysconfig.get_path("scripts"))
    quiet = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    site_packages = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    own = "".join(f"print(merge_tensors(tensors, {name!r}, base_index=0).tolist())\n" for name in METHODS)
    commands: dict[str, tuple[list[str | Path], dict[str, str]]] = {
        "yaml": ([script / "mergekit-yaml", "median.yml", "out", *quiet], environment(broken, documented)),
        "multi": ([script / "mergekit-multi", "multi.yml", "-I", "multi", *quiet], environment()),
        "pytorch": ([script / "mergekit-pytorch", "pytorch.yml", "pytorch", *quiet], environment()),
        "program": ([sys.executable, "-c", PROGRAM + own], environment(documented)),
        "own first": ([sys.executable, "-c", IMPORT + NAMES], environment()),
        "-S": ([sys.executable, "-S", "-c", NAMES + IMPORT + NAMES], environment(INSTALLED, *site_packages)),
        "off": ([sys.executable, "-c", NAMES], environment(MERGEKIT_SELECT_DISABLE="1")),
    }

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command, variables = commands[name]
        return subprocess.run(command, env=variables, cwd=work, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands), strict=True))


def assert_merged(out: Path, work: Path) -> None:
    """Every element is one of the sub-models'."""
    merged = load_file(out)
    sources = [load_file(work / "models" / model / "model.safetensors") for model in SUB_MODELS]
    assert merged.keys() == sources[0].keys()
    for name, tensor in merged.items():
        assert torch.stack([tensor == source[name] for source in sources]).any(0).all()


def test_mergekit_yaml_with_the_documented_plugin_and_broken_ones(results: Results, work: Path) -> None:
    assert results["yaml"].returncode == 0, results["yaml"].stderr
    lines = results["yaml"].stderr.splitlines()
    assert [line for line in lines if "mergekit-select" in line] == BROKEN_FOR_REAL
    merged = load_file(work / "out" / "model.safetensors")
    sources = [load_file(work / "models" / model / "model.safetensors") for model in SUB_MODELS]
    assert merged.keys() == sources[0].keys()
    for name, tensor in merged.items():
        assert tensor.equal(torch.stack([source[name] for source in sources]).median(0).values)


def test_mergekit_multi(results: Results, work: Path) -> None:
    assert results["multi"].returncode == 0, results["multi"].stderr
    assert "mergekit-select" not in results["multi"].stderr
    for name in METHODS:
        assert_merged(work / "multi" / f"by_{name}" / "model.safetensors", work)


def test_mergekit_pytorch(results: Results, work: Path) -> None:
    assert results["pytorch"].returncode == 0, results["pytorch"].stderr
    assert "mergekit-select" not in results["pytorch"].stderr
    assert_merged(work / "pytorch" / "model.safetensors", work)


def test_merge_tensors(results: Results) -> None:
    result = results["program"]
    assert (result.returncode, result.stderr) == (0, "")
    printed, *own = result.stdout.splitlines()
    assert printed + "\n" == PRINTED
    assert len(own) == 2
    for values in map(json.loads, own):
        assert values[0] in (2.0, 9.0)
        assert values[1] in (3.0, 4.0)


def test_without_the_startup_file_mergekit_is_as_it_was(results: Results) -> None:
    for name in ("-S", "off", "own first"):
        assert (results[name].returncode, results[name].stderr) == (0, "")
    before, after = (line.split() for line in results["-S"].stdout.splitlines())
    assert "linear" in before
    assert not set(METHODS) & set(before)
    assert after == before + METHODS
    assert results["off"].stdout.split() == before
    assert results["own first"].stdout.split() == after


def test_the_documented_startup_files() -> None:
    for name in ("mergekit_select.pth", "mergekit_select.start"):
        line = (INSTALLED / name).read_text().splitlines()[-1]
        assert re.search(rf"\| `{name}` \|.*\| `{re.escape(line)}` \|\n", DOCUMENT.read_text())
