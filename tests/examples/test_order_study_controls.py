"""What merges of several orders are held against, and several throws of one study; mergekit is a stand-in here."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from examples.order_study import derived
from examples.order_study.analysis import throws
from examples.order_study.analysis.results import Results
from examples.order_study.cli import main
from examples.order_study.config import load_study
from examples.order_study.errors import StudyError
from examples.order_study.measure.measure import Measurer
from examples.order_study.merge import merges as merging
from examples.order_study.model import Model
from examples.order_study.settings import Study
from examples.order_study.train.models import Trained

INTENTS = ["alarm", "weather", "music", "no idea"]
# Adds up what the recipe weighs; its selection is the first model. Writes down each recipe that it was given.
FAKE = """
import json, pathlib, shutil, sys, yaml
from safetensors.torch import load_file, save_file
recipe, out = sys.argv[1:3]
content = yaml.safe_load(open(recipe))
with open("calls.txt", "a") as file:
    file.write(recipe + "\\n")
models, base = content["models"], content.get("base_model")
shutil.copytree(models[0]["model"], out)
read = lambda folder: {name: tensor.float() for name, tensor in load_file(folder + "/model.safetensors").items()}
parts = [(one.get("parameters", {}).get("weight", 1.0), read(one["model"])) for one in models]
if content["merge_method"] == "linear":
    total = sum(weight for weight, _ in parts)
    merged = {name: sum(weight / total * part[name] for weight, part in parts) for name in parts[0][1]}
elif content["merge_method"] == "task_arithmetic":
    start = read(base)
    merged = {name: start[name] + sum(weight * (part[name] - start[name]) for weight, part in parts) for name in start}
else:
    merged = parts[0][1]
save_file({name: tensor.contiguous() for name, tensor in merged.items()}, out + "/model.safetensors")
"""
CONTROLS = ["stretched", "shrunk", "soup", "ensemble", "longer", "more-steps", "same-order"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of two throws of three orders each, a control that is trained, and data for validation."""
    (tmp_path / "mergekit.py").write_text(FAKE)
    monkeypatch.setattr(merging, "COMMAND", (sys.executable, str(tmp_path / "mergekit.py")))
    for name, number in (("train", 24), ("val", 6), ("test", 9)):
        lines = [{"text": f"say {index * 7 % 11}", "intent": INTENTS[index % 4]} for index in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = {"vocab_size": 280, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    content: dict[str, Any] = {
        "data": {
            "source": "jsonl",
            "train": "${INTENTS}/train.jsonl",
            "shuffle": 0,
            "validation": "${INTENTS}/val.jsonl",
            "validation_take": 5,
            "held_out": "${INTENTS}/test.jsonl",
            "prompt": "Which? {text}\nIntent:",
            "response": " {intent}",
        },
        "base": {
            "architecture": {**shape, "num_attention_heads": 2, "max_position_embeddings": 64},
            "training": {"epochs": 1, "learning_rate": 1e-2, "warmup_steps": 0, "saved_as": "fp32"},
            "text": [{"path": "${INTENTS}/train.jsonl", "template": "Which? {text}\nIntent: {intent}"}],
        },
        "fine_tuning": {
            "epochs": 1,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "saved_as": "fp32",
        },
        "throws": [{"orders": [1, 2, 3], "seed": 1}, {"orders": [4, 5, 6], "seed": 2}],
        "shared_prefix": True,
        "merging": {"seeds": [3], "rounds": []},
        "measuring": {"bins": 2, "bootstrap": 20, "exact_match": {"of": "response"}},
    }
    monkeypatch.setenv("INTENTS", str(tmp_path))
    (tmp_path / "intents.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "intents.yaml"


def run(config: Path, out: Path, *options: str) -> Result:
    result = CliRunner().invoke(main, [str(config), "--out", str(out), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def distance(one: Path, other: Path) -> float:
    tensors, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return float(torch.cat([(tensors[name] - others[name]).flatten().double() for name in others]).norm())


def test_every_control_has_a_row(config: Path, tmp_path: Path) -> None:
    options = ["--throw", "1", "--set", f"controls={json.dumps(CONTROLS)}"]
    told = run(config, tmp_path / "out", *options).stdout
    # The average, a selection, that of one order; stretched, shrunk, the soup, and two to choose it among.
    assert "8 sub-models to train, 8 merges to make" in told
    root = tmp_path / "out" / "throw-1"
    found = Results.model_validate_json((root / "results.json").read_bytes())
    rows = {row.label: row for row in found.table}
    names = {"longer", "more-steps", "same-order", "same-order-average", "soup", "stretched", "shrunk", "ensemble"}
    assert names <= rows.keys()
    assert len(rows["same-order"].models) == 3
    assert names <= {one.against for one in found.differences if one.row == "average"}
    assert {one.against for one in found.differences if one.row == "same-order-average"} == {"same-order"}
    # Distances: the average goes as far as selection, and selection no farther than the average.
    base = root / "models" / "base"
    average, selection = (distance(root / "merges" / name, base) for name in ("average", "selection-seed-3"))
    assert distance(root / "merges" / "stretched", base) == pytest.approx(selection, rel=1e-4)
    assert distance(root / "merges" / "shrunk", base) == pytest.approx(average, rel=1e-4)
    assert rows["average"].distance == pytest.approx(average, rel=1e-6)
    # Training: one epoch of three batches of eight; three times the epochs; three times the steps.
    steps = {
        name: len((root / "models" / name / "learning_curve.jsonl").read_text().splitlines())
        for name in ("order-1", "longer", "more-steps", "same-order-4")
    }
    assert steps == {"order-1": 3, "longer": 9, "more-steps": 12, "same-order-4": 3}
    assert distance(root / "models" / "same-order-4", root / "models" / "same-order-5") > 0
    assert rows["ensemble"].equal_to_base is None
    answers = {model["name"]: model["exact_match"] for model in found.models}
    assert all(0 <= share <= 1 for share in answers.values())
    # A second run makes nothing.
    calls = (root / "calls.txt").read_text()
    files = {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}
    assert "0 sub-models to train, 0 merges to make" in run(config, tmp_path / "out", *options).stdout
    assert (root / "calls.txt").read_text() == calls
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()} == files


def test_models_from_elsewhere_are_measured_beside_those_of_the_study_and_against_the_first(
    config: Path, tmp_path: Path
) -> None:
    options = ["--throw", "1", "--set"]
    run(config, tmp_path / "one", *options, "controls=[]")
    merges = tmp_path / "one" / "throw-1" / "merges"
    others = {"other-average": str(merges / "average"), "other-selection": str(merges / "selection-seed-3")}
    run(config, tmp_path / "one", *options, f"others={json.dumps(others)}")
    found = Results.model_validate_json((tmp_path / "one" / "throw-1" / "results.json").read_bytes())
    rows = {row.label: row for row in found.table}
    assert rows["other-average"].loss == rows["average"].loss
    assert rows["other-average"].distance == rows["average"].distance
    pairs = {(one.row, one.against): one.estimate for one in found.differences if one.measure == "loss"}
    assert ("average", "other-average") in pairs
    assert pairs["other-selection", "other-average"] == pytest.approx(
        rows["other-selection"].loss - rows["average"].loss
    )
    assert not any(row == "other-average" for row, _ in pairs)
    with pytest.raises(StudyError, match="begins with other-, got 'mine': rename it"):
        load_study(config, ["others={mine: ./mine}"])


def test_the_script_of_tasks_measures_merges_that_its_recipe_makes() -> None:
    study = Path(__file__).resolve().parents[2] / "examples" / "order_study"
    by_name = {stage["name"]: stage for stage in yaml.safe_load_all((study / "tasks.yml").read_text(encoding="utf-8"))}
    made = list(by_name)
    listed = re.search(r"for name in (.*?); do", (study / "tasks.sh").read_text(encoding="utf-8"), re.DOTALL)
    assert listed
    measured = listed[1].replace("\\", "").split()
    stages = {"intents-average", "problems-average", "intents-selection", "problems-selection"}
    assert sorted(made) == sorted({*measured, *stages})
    assert measured == [name for name in made if name not in stages]
    for stage in by_name.values():  # selections that build on each other draw with different seeds
        earlier = [by_name[entry["model"]] for entry in stage["models"] if entry["model"] in by_name]
        seeds = [one["parameters"]["seed"] for one in (stage, *earlier) if "seed" in one.get("parameters", {})]
        assert len(set(seeds)) == len(seeds), stage["name"]


def test_throws_are_run_one_by_one_and_set_beside_each_other(config: Path, tmp_path: Path) -> None:
    run(config, tmp_path / "out", "--set", "controls=[stretch-1.5]")
    root = tmp_path / "out"
    each = [Results.model_validate_json((root / f"throw-{k}" / "results.json").read_bytes()) for k in (1, 2)]
    assert [one.study.orders for one in each] == [(1, 2, 3), (4, 5, 6)]
    assert [one.study.fine_tuning.seed for one in each] == [1, 2]
    found = throws.Throws.model_validate_json((root / "results.json").read_bytes())
    assert [row.label for row in found.table][:4] == ["base", "sub-models, mean", "sub-models, best", "average"]
    for place, one in enumerate(each):
        losses = {row.label: row.loss for row in one.table}
        assert found.table[3].losses[place] == losses["average"]
    thrown = next(d for d in found.differences if (d.row, d.against) == ("average", "stretch-1.5"))
    first, second = (difference.estimate for difference in thrown.each)
    assert thrown.mean == pytest.approx((first + second) / 2)
    # Student's t with one degree of freedom, from its table.
    half = 12.7062 * abs(first - second) / 2
    assert (thrown.high - thrown.low) / 2 == pytest.approx(half, rel=1e-4)
    text = (root / "results.md").read_text()
    assert "throw 1: orders 1, 2, 3, training seed 1; throw 2: orders 4, 5, 6, training seed 2" in text
    assert throws.render(found) == text


@pytest.mark.parametrize(
    ("losses", "members", "tried"),
    [
        ({(1,): 3.0, (2,): 1.0, (3,): 2.0, (2, 3): 0.5, (2, 3, 1): 0.6}, (2, 3), [(2, 3), (2, 3, 1)]),
        ({(1,): 3.0, (2,): 1.0, (3,): 2.0, (2, 3): 1.5, (2, 1): 1.0}, (2, 1), [(2, 3), (2, 1)]),
        ({(1,): 1.0, (2,): 2.0, (3,): 3.0, (1, 2): 1.1, (1, 3): 1.1}, (1,), [(1, 2), (1, 3)]),
    ],
)
def test_a_greedy_soup_takes_what_does_not_raise_its_loss(
    losses: dict[tuple[int, ...], float],
    members: tuple[int, ...],
    tried: list[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Model] = []
    monkeypatch.setattr(derived, "make_merges", lambda study, root, models, report, jobs: made.extend(models))
    monkeypatch.setattr(
        Measurer, "validation_losses", lambda _, models: [losses[one.members or (one.seed,)] for one in models]
    )
    study = Study(orders=(1, 2, 3)).model_copy(update={"controls": ("soup",)})
    models, candidates = derived.derive(Measurer(study, tmp_path, Trained({}, (), 64), lambda _: None))
    assert [one.members for one in models] == [members]
    assert [one.members for one in candidates] == tried
    assert [one.name for one in made] == [*("soup-of-" + "-".join(map(str, some)) for some in tried), "soup"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("orders=[1]", "orders are those of each throw where there are throws: leave orders out"),
        ("throws=[{orders: [1, 2], seed: 0}]", "throws must be two or more with as many orders each"),
        ("throws=[{orders: [1, 2], seed: 0}, {orders: [2, 3], seed: 1}]", "no order may be in two of them"),
        ("throws=[{orders: [1, 2], seed: 0}, {orders: [3], seed: 1}]", "with as many orders each"),
        ("throws=[{orders: [], seed: 0}, {orders: [], seed: 1}]", "orders must be one or more different seeds, got ()"),
        ("fine_tuning.schedul=linear", "fine_tuning.schedul is no setting: did you mean schedule?"),
        ("fine_tuning.epochs.x=1", "epochs in 'fine_tuning.epochs.x=1' has no settings below it"),
        (
            "fine_tuning.gradient_checkpointing=true",
            "shared_prefix keeps keys and values, which gradient_checkpointing",
        ),
        ("fine_tuning.epochs", "--set takes a setting and its value, got 'fine_tuning.epochs'"),
        ("fine_tuning.epochs=[", "--set takes a setting and its value, got 'fine_tuning.epochs=['"),
    ],
)
def test_a_change_or_a_throw_that_cannot_be_is_named(config: Path, change: str, message: str) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(config, [change])
    assert message in str(caught.value)


def test_a_soup_asks_for_validation(config: Path) -> None:
    changes = ["controls=[soup]", "data.validation=null"]
    with pytest.raises(StudyError, match="chosen on data for validation, but data has none"):
        load_study(config, changes)


def test_throws_of_one_order_have_no_controls(config: Path) -> None:
    throws_of_one = "throws=[{orders: [1], seed: 0}, {orders: [2], seed: 1}]"
    with pytest.raises(StudyError, match=r"need two or more orders, got \['ties'\] for orders \[1\]"):
        load_study(config, [throws_of_one, "controls=[ties]"])


def test_a_merge_that_is_the_base_has_no_distance_to_stretch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Measurer, "distances", lambda _, models: [0.0, 1.0])
    study = Study(orders=(1, 2)).model_copy(update={"controls": ("stretched",)})
    with pytest.raises(StudyError, match="the average or the selection is the base: leave these controls out"):
        derived.derive(Measurer(study, tmp_path, Trained({}, (), 64), lambda _: None))


def test_a_change_takes_the_place_of_a_setting(config: Path) -> None:
    study = load_study(config, ["fine_tuning.schedule=linear", "threads=2", "measuring.seed=7"])
    assert (study.fine_tuning.schedule, study.threads, study.measuring.seed) == ("linear", 2, 7)
    assert study.fine_tuning.batch_size == 8
    first, second = study.each_throw()
    assert (first.threads, second.threads, first.fine_tuning.schedule) == (2, 2, "linear")


def test_a_throw_that_is_not_there_is_refused(config: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(config), "--out", str(tmp_path / "out"), "--throw", "3"])
    assert result.exit_code == 1
    assert "--throw must be one of the 2 throws of" in result.output


def test_records_are_shuffled_before_some_are_taken(config: Path) -> None:
    from examples.order_study.data.parts import read_parts

    every = read_parts(load_study(config))["fine_tuning"]
    some = read_parts(load_study(config, ["data.take=10"]))["fine_tuning"]
    file = read_parts(load_study(config, ["data.shuffle=null"]))["fine_tuning"]
    assert some == every[:10] != file[:10]
    assert sorted(map(str, every)) == sorted(map(str, file))
    assert len(np.unique([one.response for one in some])) > 1
