"""The merges of an order study: their recipes, and how mergekit is run; here a stand-in of it, that takes no time."""

import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from safetensors.torch import save_file

from examples.order_study.errors import StudyError
from examples.order_study.merge import merges as merging
from examples.order_study.merge.merges import make_merges, remove_others
from examples.order_study.merge.recipes import recipe
from examples.order_study.model import Model, merged
from examples.order_study.settings import Merging, Study, Training

STUDY = Study(orders=(1, 2, 3), merging=Merging(seeds=(0, 7), rounds=(1, None)))
NAMES = [
    "average",
    "selection-seed-0",
    "selection-seed-7",
    "resampling-1-seed-0",
    "resampling-1-seed-7",
    "resampling-seed-0",
    "resampling-seed-7",
]
STEP_NAMES = ["steps/000012/average", "steps/000012/selection", "steps/000012/resampling"]
# Copies the first model, and writes down that it ran.
FAKE = """
import pathlib, shutil, sys, yaml
recipe, out = sys.argv[1:3]
content = yaml.safe_load(open(recipe))
with open("calls.txt", "a") as file:
    file.write(recipe + "\\n")
shutil.copytree(content["models"][0]["model"], out)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a study with its models, and a stand-in for mergekit."""
    for number, name in enumerate(["base", *(f"{step}order-{k}" for step in ("", "steps/000012/") for k in (1, 2, 3))]):
        folder = tmp_path / "study" / "models" / name
        folder.mkdir(parents=True)
        save_file({"w": torch.full((2,), float(number))}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text("{}")
    pretend(tmp_path, monkeypatch, FAKE)
    return tmp_path / "study"


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    (folder / "mergekit.py").write_text(program)
    monkeypatch.setattr(merging, "COMMAND", (sys.executable, str(folder / "mergekit.py")))


def make(study: Study, root: Path, steps: list[int], report: Callable[[str], None], jobs: int = 1) -> list[Model]:
    """Have all merges of a study, and no others."""
    models = merged(study, steps)
    remove_others(root, models, report)
    make_merges(study, root, models, report, jobs)
    return models


def calls(root: Path) -> list[str]:
    """The recipes run since this was last asked."""
    file = root / "calls.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [Path(line).stem for line in lines]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def quiet(_: str) -> None:
    """Report nothing."""


# Recipes


def test_plan_names_every_merge() -> None:
    assert [merge.place for merge in merged(STUDY, [12])] == NAMES + STEP_NAMES
    assert [merge.place for merge in merged(STUDY, [])] == NAMES


@pytest.mark.parametrize(
    ("rounds", "of_step"), [((), None), ((2, 5), (5,)), ((None, 1), (None,))], ids=["none", "numbers", "until"]
)
def test_states_are_resampled_as_far_as_the_finished_ones(
    rounds: tuple[int | None, ...], of_step: tuple[int | None] | None
) -> None:
    merges = merged(STUDY.model_copy(update={"merging": Merging(seeds=(7,), rounds=rounds)}), [12])
    steps = [merge for merge in merges if merge.step is not None]
    assert [merge.seed for merge in steps] == [None, 7, 7][: len(steps)]
    assert tuple(merge.rounds for merge in steps[2:]) == (of_step or ())


@pytest.mark.parametrize("merge", merged(STUDY, [12]), ids=lambda merge: merge.place)
def test_recipes_are_what_mergekit_reads(merge: Model) -> None:
    text = recipe(merge, STUDY)
    content = yaml.safe_load(text)
    MergeConfiguration.model_validate(content)
    place = "./models" if merge.step is None else "./models/steps/000012"
    assert [model["model"] for model in content["models"]] == [f"{place}/order-{order}" for order in (1, 2, 3)]
    assert content["dtype"] == "bfloat16"
    if merge.kind == "average":
        # mergekit's linear would average a base_model in.
        assert content.keys() == {"merge_method", "models", "dtype"}
        assert content["merge_method"] == "linear"
        assert {model["parameters"]["weight"] for model in content["models"]} == {1.0}
        assert "pip install mergekit\n" in text
    else:
        method = "parameter_selection" + ("_resampling" if merge.kind == "resampling" else "")
        assert (content["merge_method"], content["base_model"]) == (method, "./models/base")
        rounds = {} if merge.rounds is None else {"rounds": merge.rounds}
        assert content["parameters"] == {"seed": merge.seed, "draws": 1, **rounds}
        assert "pip install mergekit-select\n" in text


def test_recipe_in_full() -> None:
    assert recipe(Model("resampling", 7, 2, 12), STUDY) == (
        "# Parameter selection with resampling, up to 2 times, from the sub-models of an order study after 12 steps of "
        "fine-tuning, seed 7.\n"
        "#\n"
        "# Needs:   pip install mergekit-select\n"
        "# Run:     mergekit-yaml recipes/steps-000012-resampling.yml ./again   (in the folder of the study, the one "
        "above this)\n"
        "merge_method: parameter_selection_resampling\n"
        "base_model: ./models/base # what the sub-models were fine-tuned from; never drawn\n"
        "models:\n"
        "  - model: ./models/steps/000012/order-1\n"
        "  - model: ./models/steps/000012/order-2\n"
        "  - model: ./models/steps/000012/order-3\n"
        "parameters:\n"
        "  seed: 7\n"
        "  draws: 1\n"
        "  rounds: 2\n"
        "dtype: bfloat16\n"
    )


@pytest.mark.parametrize(
    ("control", "method", "weight"),
    [("ties", "ties", 1.0), ("dare_ties", "dare_ties", 1.0), ("stretch-1.5", "task_arithmetic", 0.5)],
)
def test_controls_are_mergekits_methods(control: str, method: str, weight: float) -> None:
    (model,) = merged(STUDY.model_copy(update={"controls": (control, "longer")}))[len(NAMES) :]
    content = yaml.safe_load(recipe(model, STUDY))
    MergeConfiguration.model_validate(content)
    assert (model.name, content["merge_method"], content["base_model"]) == (control, method, "./models/base")
    assert [one["parameters"]["weight"] for one in content["models"]] == [weight] * 3


def test_one_order_is_not_merged() -> None:
    assert merged(STUDY.model_copy(update={"orders": (1,)}), [12]) == []


def test_recipes_keep_the_dtype_that_models_are_saved_in() -> None:
    study = STUDY.model_copy(update={"fine_tuning": Training(epochs=1, learning_rate=1e-3, saved_as="fp32")})
    assert recipe(Model("average", None), study).endswith("\ndtype: float32\n")


# Making and reusing


def test_merges_are_made_once_and_reused(root: Path) -> None:
    lines: list[str] = []
    merges = make(STUDY, root, [12], lines.append)
    assert [merge.place for merge in merges] == NAMES + STEP_NAMES
    assert calls(root) == [merge.place.replace("/", "-") for merge in merges]
    assert [line.split(": merged in ")[0] for line in lines] == [str(root / "merges" / merge.place) for merge in merges]
    for merge in merges:
        record = json.loads((root / "merges" / merge.place / "made.json").read_text())
        assert len(record["made_from"]["weights_sha256"]) == (3 if merge.kind == "average" else 4)
        assert record["made_from"]["versions"].keys() >= {"mergekit", "mergekit-select", "torch"}
    assert not list(root.rglob(".*"))

    before = contents(root)
    lines.clear()
    make(STUDY, root, [12], lines.append)
    assert calls(root) == []
    assert contents(root) == before
    assert lines == [f"{root / 'merges'}: {len(merges)} reused"]


def _remove(root: Path) -> None:
    shutil.rmtree(root / "merges" / "selection-seed-7")


def _damage(root: Path) -> None:
    weights = root / "merges" / "selection-seed-7" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")


def _lose_weights(root: Path) -> None:
    (root / "merges" / "selection-seed-7" / "model.safetensors").unlink()


def _old_record(root: Path) -> None:
    record = root / "merges" / "selection-seed-7" / "made.json"
    record.write_text(json.dumps({"written_by": "order_study", "of": "an earlier version"}))


def _older_mergekit(root: Path) -> None:
    record = root / "merges" / "selection-seed-7" / "made.json"
    content = json.loads(record.read_text())
    content["made_from"]["versions"]["mergekit"] = "0.1.4"
    record.write_text(json.dumps(content))


def _other_base(root: Path) -> None:
    save_file({"w": torch.full((2,), 9.0)}, root / "models" / "base" / "model.safetensors")


def _other_state(root: Path) -> None:
    save_file({"w": torch.full((2,), 9.0)}, root / "models" / "steps" / "000012" / "order-3" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (_remove, ["selection-seed-7"]),
        (_damage, ["selection-seed-7"]),
        (_lose_weights, ["selection-seed-7"]),
        (_old_record, ["selection-seed-7"]),
        (_older_mergekit, ["selection-seed-7"]),
        (_other_base, [*NAMES[1:], *STEP_NAMES[1:]]),
        (_other_state, STEP_NAMES),
    ],
)
def test_only_what_changed_is_merged_again(root: Path, change: Callable[[Path], None], made: list[str]) -> None:
    make(STUDY, root, [12], quiet)
    calls(root)
    change(root)
    make(STUDY, root, [12], quiet)
    assert calls(root) == [name.replace("/", "-") for name in made]


def test_merges_no_longer_asked_for_are_removed(root: Path) -> None:
    make(STUDY, root, [12], quiet)
    mine = root / "merges" / "by-hand"
    mine.mkdir()
    (root / "recipes" / "mine.yml").write_text("# my own\n")
    calls(root)
    lines: list[str] = []
    make(STUDY.model_copy(update={"merging": Merging(seeds=(0,), rounds=())}), root, [], lines.append)
    assert calls(root) == []
    kept = ["average", "selection-seed-0"]
    assert sorted(folder.name for folder in (root / "merges").iterdir()) == [*kept[:1], "by-hand", *kept[1:]]
    assert sorted(file.stem for file in (root / "recipes").iterdir()) == [*kept[:1], "mine", *kept[1:]]
    assert f"{root / 'merges' / 'selection-seed-7'}: removed, since these settings do not ask for it" in lines


def test_a_folder_of_someone_else_is_not_touched(root: Path) -> None:
    precious = root / "merges" / "average" / "model.safetensors"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    with pytest.raises(StudyError, match=r"merges/average has no made\.json that says so: move it away"):
        make(STUDY, root, [], quiet)
    assert precious.read_bytes() == b"precious"
    assert calls(root) == []


def test_two_jobs_run_at_once_and_give_the_same(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(STUDY, root, [12], quiet)
    one = {name: content for name, (content, _) in contents(root / "merges").items()}
    shutil.rmtree(root / "merges")
    # Each merge waits for another that runs at the same time.
    waiting = (
        "import pathlib, sys, time\n"
        "mine = pathlib.Path('at-once'); mine.mkdir(exist_ok=True)\n"
        "(mine / pathlib.Path(sys.argv[1]).stem).touch()\n"
        "until = time.monotonic() + 300\n"
        "while len(list(mine.iterdir())) < 2 and time.monotonic() < until: time.sleep(0.01)\n"
        "assert len(list(mine.iterdir())) >= 2\n"
    )
    pretend(tmp_path, monkeypatch, waiting + FAKE)
    make(STUDY, root, [12], quiet, jobs=2)
    assert {name: content for name, (content, _) in contents(root / "merges").items()} == one


# What goes wrong


def test_a_failing_mergekit_shows_its_last_lines(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = FAKE + "\nif 'selection' in recipe:\n    print(*range(30), sep='\\n'); sys.exit('no such tensor')"
    pretend(tmp_path, monkeypatch, program)
    with pytest.raises(StudyError) as caught:
        make(STUDY, root, [], quiet)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"mergekit must make a complete model of {root / 'recipes' / 'selection-seed-0.yml'}, but it ended with exit "
        "status 1 and these last lines: mend the cause and run again"
    )
    assert lines[-1] == "  no such tensor"
    assert lines[-2] == "  29"
    assert len(lines) == 16
    assert [folder.name for folder in (root / "merges").iterdir()] == ["average"]

    pretend(tmp_path, monkeypatch, FAKE)
    calls(root)
    make(STUDY, root, [], quiet)
    assert calls(root) == NAMES[1:]


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_an_incomplete_merge_is_not_taken_for_finished(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    # mergekit ends well though it could not copy a tokenizer.
    pretend(tmp_path, monkeypatch, FAKE + f"\npathlib.Path(out, {lost!r}).unlink()")
    with pytest.raises(StudyError, match=r"but it ended with exit status 0 and these last lines.*\n  \(none\)$"):
        make(STUDY, root, [], quiet)
    assert list((root / "merges").iterdir()) == []


@pytest.mark.slow  # by chance of timing, a merge is not finished yet
def test_an_interrupt_stops_mergekit_and_keeps_what_is_finished(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = "import os, time\nif 'seed-7' in sys.argv[1]:\n    open('pid', 'w').write(str(os.getpid()))\n"
    pretend(tmp_path, monkeypatch, "import sys\n" + endless + "    time.sleep(600)\n" + FAKE)

    def interrupted(line: str) -> None:
        if "selection-seed-0" in line:
            until = time.monotonic() + 300
            while not pid.exists() or not pid.read_text():
                assert time.monotonic() < until
            raise KeyboardInterrupt

    pid = root / "pid"

    with pytest.raises(KeyboardInterrupt):
        make(STUDY, root, [], interrupted, jobs=3)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not list(root.rglob(".*"))
    assert (root / "merges" / "selection-seed-0" / "made.json").exists()
    pretend(tmp_path, monkeypatch, FAKE)
    calls(root)
    make(STUDY, root, [], quiet)
    made = calls(root)
    assert "selection-seed-7" in made
    assert not {"average", "selection-seed-0"} & set(made)
    assert sorted(folder.name for folder in (root / "merges").iterdir()) == sorted(NAMES)


def test_what_a_killed_run_left_is_cleaned_up(root: Path) -> None:
    left = root / "merges" / ".average.merging.unfinished" / "average"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    make(STUDY, root, [], quiet)
    assert not list(root.rglob(".*"))


def test_without_the_plugin_it_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "mergekit-select":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("importlib.metadata.version", version)
    with pytest.raises(StudyError) as caught:
        make(STUDY, root, [], quiet)
    assert str(caught.value) == (
        "the merges are made by mergekit and its plugin mergekit-select, but mergekit-select is not installed: run "
        "`pip install mergekit-select`"
    )
