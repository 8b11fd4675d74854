"""Every recipe in the gallery runs as its comment says and gives what it promises; and the page of the matrix."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.compatibility import shows
from tests.support import expectation
from tests.support.commands import run_here
from tests.support.expectation import Stored
from tests.support.models import Family
from tests.support.recipes import merge, recipe
from tests.support.stored import cast, filled, opened, read_all, stored

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(file.name for file in FOLDER.iterdir())
ORDERS = ["order-1", "order-2", "order-3"]
LAYER = re.compile(r"\.layers\.(\d+)\.")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")

Tensors = dict[str, Stored]


def comment(file: Path) -> list[str]:
    """The comment on top of a recipe, without the number signs."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    return lines


def commands(file: Path, label: str) -> list[list[str]]:
    return [shlex.split(line.removeprefix(label)) for line in comment(file) if line.startswith(label)]


def drawn(
    models: Path,
    names: list[str],
    *,
    resampled: bool = False,
    weights: expectation.Weights | None = None,
    seed: int = 0,
) -> Tensors:
    base, *subs = read_all(models / "base", *(models / name for name in names))
    return expectation.expected(subs, base if resampled else None, weights=weights, seed=seed)


def layer_of(name: str) -> int:
    found = LAYER.search(name)
    return int(found[1]) if found else 0


def average(models: Path) -> Tensors:
    """In fp32, in the order of the recipe, rounded to bf16 at the end: as mergekit's `linear` has it."""
    subs = [cast(tensors, torch.float32) for tensors in read_all(*(models / name for name in ORDERS))]
    means = {name: torch.stack([opened(sub[name]) for sub in subs]).sum(0) / len(subs) for name in subs[0]}
    return cast({name: stored(mean) for name, mean in means.items()}, torch.bfloat16)


def stretched(models: Path) -> Tensors:
    """What mergekit wrote, once it is the average's step from the base times 1.1 up to the rounding of bf16."""
    base, *subs = (cast(tensors, torch.float64) for tensors in read_all(*(models / n for n in ["base", *ORDERS])))
    written = expectation.read(models.parent / "out")
    for name, tensor in cast(written, torch.float64).items():
        start, value = opened(base[name]), opened(tensor)
        steps = torch.stack([opened(sub[name]) for sub in subs]) - start
        step = steps.mean(0)
        wanted = start + 1.1 * step
        rounding = 2**-8 * (wanted.abs() + steps.abs().sum(0))
        assert ((value - wanted).abs() <= rounding).all(), name
        assert (value - start - step).norm() > 0.05 * step.norm(), name
    return written


def two_stages(models: Path) -> Tensors:
    """Both stages drawn by hand, then mergekit's `ties` of them."""
    by_hand = []
    for seed, (name, runs) in enumerate({"first-task": ORDERS[:2], "second-task": ORDERS[1:]}.items()):
        tensors = drawn(models, runs, seed=seed)
        expectation.assert_same(expectation.read(models / "stages" / name), tensors)
        by_hand.append(filled(models / "base", models / f"by-hand-{name}", tensors))
    settings = [{"weight": 1.0, "density": 0.5}] * 2
    config = recipe("ties", models / "base", by_hand, model_parameters=settings, dtype="bfloat16")
    return expectation.read(merge(config, models / "ties"))


def adapters(models: Path) -> Tensors:
    """Drawn among what mergekit made of base and adapters, in which nothing but the adapters' targets has moved."""
    base = expectation.read(models / "base")
    merged = read_all(*(next((models / "lora-cache").glob(f"base_*_lora-{k}_*")) for k in (1, 2, 3)))
    for tensors in merged:
        moved = {name for name in base if not np.array_equal(tensors[name].bits, base[name].bits)}
        assert moved == {name for name in base if "_proj" in name}
    return expectation.expected(merged)


EXPECTED: dict[str, Callable[[Path], Tensors]] = {
    "average.yml": average,
    "stretched-average.yml": stretched,
    "select.yml": lambda models: drawn(models, ORDERS),
    "resample.yml": lambda models: drawn(models, ORDERS, resampled=True),
    "unequal-weights.yml": lambda models: drawn(models, ORDERS, weights=lambda _name: [1, 1, 2]),
    "by-layer.yml": lambda models: drawn(
        models, ORDERS, weights=lambda name: [1 - layer_of(name) / 2, 0.5, layer_of(name) / 2]
    ),
    "by-module.yml": lambda models: drawn(
        models, ORDERS, weights=lambda name: [1, 0, 0] if ".self_attn." in name else [1, 1, 1]
    ),
    "tasks.yml": lambda models: drawn(models, ORDERS, resampled=True, weights=lambda _name: [2, 1, 1]),
    "two-stage.yml": two_stages,
    "lora.yml": adapters,
    "public-base.yml": lambda models: drawn(models, ORDERS),
}


@pytest.fixture(scope="module")
def models(llamas: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `make merge` leaves it, with smaller models."""
    folder = tmp_path_factory.mktemp("gallery") / "models"
    for name, source in zip(["base", *ORDERS], llamas.everyone, strict=True):
        shutil.copytree(source, folder / name)
    return folder


def with_local_models(text: str) -> str:
    """A recipe whose hub ids are those of the local models: the base's in the place of the base, then the others."""
    local = iter(["base", *ORDERS])
    return HUB_ID.sub(lambda _: f"./models/{next(local)}", text)


SAYS: dict[str, str] = {
    "average.yml": "mergekit's own `linear`, to compare with",
    "stretched-average.yml": "mergekit's own `task_arithmetic`, to compare with",
    "lora.yml": "with the adapters that the commands in its comment make",
    "public-base.yml": "hub ids replaced by local models in the test",
}


@shows("Recipes", lambda name: f"[{name}](../recipes/{name})", methods=(), note=lambda name: SAYS.get(name, ""))
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_its_comment_says(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / name).write_text(with_local_models((FOLDER / name).read_text(encoding="utf-8")))
    monkeypatch.chdir(tmp_path)
    for script, *arguments in [*commands(FOLDER / name, "First:"), *commands(FOLDER / name, "Run:")]:
        run_here(script, *arguments)

    expectation.assert_same(expectation.read(tmp_path / "out"), EXPECTED[name](tmp_path / "models"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_card_for_whom_what_it_needs_how_to_run_it_what_it_gives(name: str) -> None:
    assert problems_with(FOLDER / name) == []


def problems_with(file: Path) -> list[str]:
    """What a recipe of the gallery lacks."""
    lines, documents = comment(file), list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    ours = [document for document in documents if document["merge_method"].startswith("parameter_selection")]
    package = "mergekit-select" if ours else "mergekit"
    run = commands(file, "Run:")
    wanted = {
        "a comment on top of five lines and more": len(lines) >= 5,
        "for whom it is": any(line.startswith("For:") for line in lines),
        "the package to install": any(re.match(rf"Needs: +pip install {package}( |;|$)", line) for line in lines),
        "one command to run it with": len(run) == 1 and f"recipes/{file.name}" in run[0],
        "what it gives": any(line.startswith("Gives:") for line in lines),
        "a test": file.name in EXPECTED,
        "the version of the draws": all(document.get("parameters", {}).get("draws") == 1 for document in ours),
    }
    stages = [document.get("name") for document in documents]
    for document in documents:
        used = [document.get("base_model"), *(entry["model"] for entry in document.get("models", []))]
        for model in used:
            parts = [] if model in stages else model.split("+")
            local = all(part.startswith("./models/") or HUB_ID.fullmatch(part) for part in parts)
            wanted[f"a path that begins with ./models/ or a hub id with its commit, not {model}"] = local
    return [what for what, there in wanted.items() if not there]


def test_a_recipe_without_a_comment_or_a_test_is_noticed(tmp_path: Path) -> None:
    config = {"merge_method": "parameter_selection", "models": [{"model": "m/order-1"}, {"model": "./models/order-2"}]}
    (tmp_path / "new.yml").write_text(yaml.safe_dump(config))
    assert problems_with(tmp_path / "new.yml") == [
        "a comment on top of five lines and more",
        "for whom it is",
        "the package to install",
        "one command to run it with",
        "what it gives",
        "a test",
        "the version of the draws",
        "a path that begins with ./models/ or a hub id with its commit, not m/order-1",
    ]


def test_the_gallery_and_its_tests_are_the_same() -> None:
    assert sorted(EXPECTED) == RECIPES
