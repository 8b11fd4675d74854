"""A whole order study, minuscule, through the real command line and the real mergekit."""

import errno
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.order_study import study as study_module
from examples.order_study import throws as throws_module
from examples.order_study.analysis.results import Results
from examples.order_study.cli import main
from examples.order_study.config import load_study
from examples.order_study.data.order import batches
from examples.order_study.data.parts import read_parts
from examples.order_study.errors import StudyError
from examples.order_study.measure import measure
from examples.order_study.measure.measure import Measurer
from examples.order_study.model import merged, trained
from examples.order_study.settings import Measuring, Study
from examples.order_study.store import disk
from examples.order_study.train.models import Trained, train_models
from tests.support.pages import ROOT

SAMPLES, HELD_OUT, ANSWERED, BATCH = 20, 9, 6, 4
STEP = 5  # of 10: two epochs of five batches
MERGES = ("average", "selection-seed-3", "resampling-1-seed-3", "resampling-seed-3")
STATES = tuple(f"steps/{STEP:06}/{kind}" for kind in ("average", "selection", "resampling"))


def record(generator: random.Random) -> str:
    one, other = generator.randrange(10), generator.randrange(10)
    answer = f"{one} and {other} make\n#### {one + other}"
    return json.dumps({"question": f"{one}+{other}", "answer": answer}) + "\n"


def configure(folder: Path, **changes: Any) -> Path:
    """Write data and a configuration, and return the latter's path."""
    generator = random.Random(0)
    (folder / "train.jsonl").write_text("".join(record(generator) for _ in range(SAMPLES)))
    (folder / "test.jsonl").write_text("".join(record(generator) for _ in range(HELD_OUT)))
    architecture = {
        "vocab_size": 280,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    content = {
        "data": {
            "source": "jsonl",
            "train": str(folder / "train.jsonl"),
            "held_out": str(folder / "test.jsonl"),
            "prompt": "Q: {question}\nA:",
            "response": " {answer}",
        },
        "base": {
            "architecture": architecture,
            "training": {"epochs": 4, "learning_rate": 2e-2, "warmup_steps": 0},
            "text": [{"path": str(folder / "train.jsonl"), "template": "Q: {question}\nA: {answer}"}],
        },
        "fine_tuning": {"epochs": 2, "batch_size": BATCH, "learning_rate": 1e-3, "warmup_steps": 0},
        "orders": [1, 2],
        "checkpoints": 1,
        "merging": {"seeds": [3], "rounds": [1, None]},
        "measuring": {"bins": 3, "bootstrap": 20, "batch_size": 4, "exact_match": {"samples": ANSWERED}},
        **changes,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder / "tiny.yaml"


def invoke(config: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [str(config), "--out", str(out), *options])


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def load(file: Path) -> Results:
    return Results.model_validate_json(file.read_bytes())


def material(study: Study, root: Path) -> Trained:
    """What the models of a finished study are measured with."""
    return train_models(study, root, read_parts(study), quiet)


def told(result: Result, root: Path) -> list[str]:
    """What a run reported, without its times, and without the training's own lines."""
    lines = [line.removeprefix(f"{root}/").split(" in ")[0] for line in result.stdout.splitlines()]
    return [line for line in lines if not line.startswith((f"{root}: ", "training "))]


def quiet(_: str) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return configure(tmp_path_factory.mktemp("configuration"))


@pytest.fixture(scope="module")
def study(config: Path) -> Study:
    return load_study(config)


@pytest.fixture(scope="module")
def root(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished study; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("study") / "runs" / "tiny"
    result = invoke(config, folder)
    assert result.exit_code == 0, result.output
    assert f"{folder}: 2 sub-models to train, 7 merges to make, 12 models to save in all, of 11,184" in result.stdout
    # 11,184 parameters, their gradients and Adam's two moments, in fp32.
    assert "; a training takes 0.2 MB of memory, and its activations\n" in result.stdout
    assert len(re.findall(r"order-\d: trained in \d+ s(; about \d+ s of training left)?\n", result.stdout)) == 2
    lines = told(result, folder)
    assert [line for line in lines if "measured" not in line] == [
        *(f"models/{name}: trained" for name in ("base", "order-1", "order-2")),
        *(f"merges/{name}: merged" for name in MERGES + STATES),
        "results.json: written",
        "results.md: written",
        "figures: written",
    ]
    assert sum("measured" in line for line in lines) == 11  # of 12, as two are the same
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy of the finished study that a test may spoil."""
    return shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copy2)


@pytest.fixture
def no_mergekit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("mergekit was started")

    monkeypatch.setattr("subprocess.Popen", refuse)


# What comes out


def test_the_study_leaves_all_that_it_says(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == [
        "figures",
        "losses",
        "made.json",
        "merges",
        "models",
        "recipes",
        "results.json",
        "results.md",
    ]
    assert not [path for path in root.rglob("*") if path.name.startswith(".") or "unfinished" in path.name]
    for figure in ("position-first-epoch", "position-last-epoch", "anchor", "steps"):
        assert (root / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(figures/{figure}.png)" in (root / "results.md").read_text()
    assert {file.stem for file in (root / "recipes").iterdir()} == {
        name.replace("/", "-") for name in (*MERGES, *STATES)
    }


def response_loss(model: Any, tokenizer: Any, prompt: str, response: str) -> tuple[float, int]:
    """One sample alone: no batches, no padding, no library loss."""
    ids = tokenizer(prompt)["input_ids"]
    answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer])).logits[0].double()
    places = range(len(ids) - 1, len(ids) + len(answer) - 1)
    total = -sum(math.log(torch.softmax(logits[place], 0)[token]) for place, token in zip(places, answer, strict=True))
    return total, len(answer)


@pytest.mark.parametrize(
    ("folder", "name", "step"),
    [
        ("models/order-1", "order-1", None),
        ("merges/selection-seed-3", "selection-seed-3", None),
        (f"models/steps/{STEP:06}/order-2", "order-2", STEP),
        (f"merges/steps/{STEP:06}/average", "average", STEP),
    ],
)
def test_losses_are_those_of_the_models_on_disk(
    config: Path, root: Path, folder: str, name: str, step: int | None
) -> None:
    (model,) = [one for one in load(root / "results.json").models if (one["name"], one["step"]) == (name, step)]
    tokenizer = AutoTokenizer.from_pretrained(root / folder)
    on_disk = AutoModelForCausalLM.from_pretrained(root / folder, dtype=torch.float32)
    expected = []
    for file in ("test", "train"):
        lines = [json.loads(line) for line in (config.parent / f"{file}.jsonl").read_text().splitlines()]
        losses = [response_loss(on_disk, tokenizer, f"Q: {one['question']}\nA:", f" {one['answer']}") for one in lines]
        expected.append(sum(total for total, _ in losses) / sum(tokens for _, tokens in losses))
    assert model["loss"] == pytest.approx(expected[0], rel=1e-5)
    if step is None:
        assert model["training_loss"] == pytest.approx(expected[1], rel=1e-5)
    else:
        assert model["training_loss"] is None


def test_exact_match_is_that_of_each_answer_alone(config: Path, root: Path) -> None:
    folder = root / "models" / "order-1"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right = 0
    for line in (config.parent / "test.jsonl").read_text().splitlines()[:ANSWERED]:
        one = json.loads(line)
        prompt = tokenizer(f"Q: {one['question']}\nA:", return_tensors="pt")
        room = 64 - prompt["input_ids"].shape[1]
        out = model.generate(**prompt, max_new_tokens=room, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        answer = str(tokenizer.decode(out, skip_special_tokens=True))
        number = answer.partition("#### ")[2].split("\n")[0]
        right += number.isdecimal() and Decimal(number) == Decimal(one["answer"].partition("#### ")[2])
    models = load(root / "results.json").models
    (one,) = [model for model in models if (model["name"], model["step"]) == ("order-1", None)]
    assert one["exact_match"] == pytest.approx(right / ANSWERED)
    assert all((model["exact_match"] is None) == (model["step"] is not None) for model in models)


def bits(file: Path) -> torch.Tensor:
    tensors = load_file(file / "model.safetensors")
    return torch.cat([tensors[name].view(torch.int16).flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("step", [None, STEP])
def test_merges_are_what_their_recipes_say(root: Path, step: int | None) -> None:
    below = "" if step is None else f"steps/{step:06}/"
    suffix = "-seed-3" if step is None else ""
    base = bits(root / "models" / "base")
    one, other = (bits(root / "models" / f"{below}order-{seed}") for seed in (1, 2))
    selection, resampling = (bits(root / "merges" / f"{below}{kind}{suffix}") for kind in ("selection", "resampling"))
    average = bits(root / "merges" / f"{below}average").view(torch.bfloat16)

    differ = one != other
    assert 0.3 < (selection == one)[differ].double().mean() < 0.7
    for merge in (selection, resampling):
        assert bool(((merge == one) | (merge == other)).all())
    assert bool(((resampling != base) | ((one == base) & (other == base))).all())
    assert bool(((selection == base) & (resampling != base)).any())
    mean = (one.view(torch.bfloat16).float() + other.view(torch.bfloat16).float()) / 2
    assert bool(((average.float() - mean).abs() <= mean.abs() * 2**-8).all())


def test_share_equal_to_base_is_that_of_the_weights(root: Path) -> None:
    base = bits(root / "models" / "base")
    for model in load(root / "results.json").models:
        below = "" if model["step"] is None else f"steps/{model['step']:06}/"
        folder = root / ("models" if model["kind"] in ("base", "sub-model") else "merges") / below / model["name"]
        equal = None if model["kind"] == "base" else float((bits(folder) == base).double().mean())
        assert model["equal_to_base"] == equal


def test_positions_are_the_batches_of_the_training(study: Study) -> None:
    for seed in study.orders:
        where = study_module._positions(study, seed, SAMPLES)
        assert (where.order, where.batches) == (f"order-{seed}", SAMPLES // BATCH)
        for epoch, place in ((0, where.first), (1, where.last)):
            for number, batch in enumerate(batches(SAMPLES, seed, epoch, BATCH, "redrawn")):
                assert {int(place[sample]) for sample in batch} == {number}
    some = study.model_copy(update={"measuring": Measuring(training_samples=7)})
    whole = study_module._positions(study, 1, SAMPLES).first
    assert list(study_module._positions(some, 1, SAMPLES).first) == list(whole[:7])


def test_models_with_the_same_weights_are_measured_once(root: Path) -> None:
    # With two sub-models one round of resampling is as good as any number.
    one, other = (root / "losses" / f"resampling-{name}" for name in ("1-seed-3", "seed-3"))
    files = {file.name: file.read_bytes() for file in other.iterdir()}
    assert files.pop("training.json")  # of the one that the figures show
    assert {file.name: file.read_bytes() for file in one.iterdir()} == files


# Running again


@pytest.mark.usefixtures("no_mergekit")
def test_a_second_run_reuses_everything(config: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(root)
    monkeypatch.setattr(measure, "load_model", None)
    result = invoke(config, root)
    assert result.exit_code == 0, result.output
    assert contents(root) == before
    assert told(result, root) == [
        *(f"models/{name}: reused" for name in ("base", "order-1", "order-2")),
        "merges: 7 reused",
        "losses: reused",
        "results.json: as it was",
        "results.md: as it was",
        "figures: as it was",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_trains_and_measures_the_same(
    config: Path, root: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(ROOT)
    shutil.rmtree(copy / "models" / "order-2")
    shutil.rmtree(copy / "losses")
    result = invoke(config, copy, "--ray", "auto")
    assert result.exit_code == 0, result.output
    assert "models/order-2: trained" in told(result, copy)
    weights = [folder / "models" / "order-2" / "model.safetensors" for folder in (root, copy)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (copy / "results.json").read_bytes() == (root / "results.json").read_bytes()


def test_a_cluster_that_does_not_answer_is_one_line(config: Path, copy: Path) -> None:
    pytest.importorskip("ray")
    shutil.rmtree(copy / "losses")
    result = invoke(config, copy, "--ray", "nowhere")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: --ray must be auto or host:port, such as ")


def test_a_lost_merge_is_made_again_alone(config: Path, root: Path, copy: Path) -> None:
    shutil.rmtree(copy / "merges" / "selection-seed-3")
    shutil.rmtree(copy / "losses" / "selection-seed-3")
    result = invoke(config, copy)
    assert result.exit_code == 0, result.output
    assert [line for line in told(result, copy) if "reused" not in line][:2] == [
        "merges/selection-seed-3: merged",
        "merges/selection-seed-3: measured",
    ]
    # mergekit's model card names the models in the order of a set, which changes from process to process.
    card = "merges/selection-seed-3/README.md"
    after, before = contents(copy), contents(root)
    assert sorted(after[card][0].split(b"\n")) == sorted(before[card][0].split(b"\n"))
    assert {name: after[name][0] for name in after if name != card} == {
        name: before[name][0] for name in before if name != card
    }


def test_measuring_goes_on_where_it_was_interrupted(
    study: Study, root: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "losses")
    models = [*trained(study, [STEP]), *merged(study, [STEP])]
    done = material(study, copy)
    # Two processes, which must not decide a bit of what is measured.
    Measurer(study, copy, done, quiet, jobs=2).measured(models[:3])
    lines: list[str] = []
    Measurer(study, copy, done, lines.append).measured(models)
    assert len(lines) == 8  # of 9, one of which equals another
    assert all(re.search(r": measured in \d+ s, \d of 8, \d+ s left$", line) for line in lines)
    assert {name: content for name, (content, _) in contents(copy / "losses").items()} == {
        name: content for name, (content, _) in contents(root / "losses").items()
    }


@pytest.mark.usefixtures("no_mergekit")
def test_other_measuring_trains_and_merges_nothing(config: Path, copy: Path, tmp_path: Path) -> None:
    changed = configure(
        tmp_path,
        data=load_study(config).data.model_dump(),
        base=load_study(config).base.model_dump(exclude_none=True),
        measuring={"bins": 2, "bootstrap": 10, "training_samples": 12},
    )
    result = invoke(changed, copy)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == (
        f"{copy}: other settings than the last time; what does not depend on them is reused"
    )
    assert "merges: 7 reused" in result.output
    results = load(copy / "results.json")
    assert (results.training_samples, results.exact_match_samples) == (12, None)
    written = json.loads((copy / "made.json").read_bytes())["made_from"]
    assert Study.model_validate(written) == results.study == load_study(changed)


# What goes wrong


def test_a_folder_of_someone_else_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "results.json").write_text("mine")
    result = invoke(config, tmp_path / "precious")
    assert result.exit_code == 1
    assert result.output == (
        f"Error: a folder is only replaced if this program wrote it, but {tmp_path / 'precious'} has no made.json "
        "that says so: move it away, or choose another folder with --out\n"
    )
    assert contents(tmp_path / "precious").keys() == {"results.json"}


def test_a_study_that_would_not_fit_is_refused_before_it_begins(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_free", lambda _: 10_000)
    result = invoke(config, tmp_path / "out")
    assert result.exit_code == 1
    # Base, 2 sub-models and their 2 states, 7 merges, of 2 bytes a parameter; and 3 states to resume from, of 12.
    assert result.output == (
        "Error: a study must fit on the disk, but 12 models of 11,184 parameters, with what training resumes from, "
        f"take about 0.7 MB, and {tmp_path / 'out'} has 0.0 MB left: make room, choose another folder with --out, or "
        "ask for fewer orders, checkpoints, merge seeds or jobs\n"
    )
    assert not (tmp_path / "out" / "models").exists()


def _no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _no_space_for_tensors(*_: object, **__: object) -> None:
    raise RuntimeError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space" }')


@pytest.mark.parametrize("full", [_no_space, _no_space_for_tensors])
@pytest.mark.parametrize("place", ["make_merges", "Measurer", "draw"])
@pytest.mark.usefixtures("no_mergekit")
def test_a_disk_that_fills_up_is_named(
    study: Study, copy: Path, monkeypatch: pytest.MonkeyPatch, place: str, full: Callable[..., None]
) -> None:
    monkeypatch.setattr(study_module, place, full)
    with pytest.raises(
        StudyError, match=r"the disk that holds .*copy is full, with .* left .*: make room and run again"
    ):
        study_module.run_study(study, copy, quiet)


def test_an_interrupt_is_one_line_that_says_how_to_go_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study_module, "train_models", interrupted)
    result = invoke(config, tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "Error: interrupted; what is finished is kept, and the same command goes on from here\n"


def test_figures_that_cannot_be_drawn_are_known_of_at_once(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = invoke(config, tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.startswith("Error: figures are drawn by matplotlib, which is not installed: pip install")
    assert not (tmp_path / "out").exists()


def test_exact_match_of_words_is_refused(study: Study, copy: Path) -> None:
    done = material(study, copy)
    done.samples["held_out"].responses[2] = " none at all"
    with pytest.raises(StudyError, match=r"but the response ' none at all' of the held-out part has none: leave"):
        Measurer(study, copy, done, quiet).measured(trained(study))


def test_a_model_that_diverged_is_named(study: Study, copy: Path) -> None:
    file = copy / "losses" / "order-2" / "held_out.json"
    entry = json.loads(file.read_text())
    entry["total"][0] = math.nan
    file.write_text(json.dumps(entry))
    with pytest.raises(StudyError, match=r"losses must be finite, but order-2, step final, has a loss of nan"):
        Measurer(study, copy, material(study, copy), quiet).measured(trained(study))


@pytest.mark.parametrize("content", ["", "{", '{"key": {}}'])
def test_a_damaged_measurement_is_made_again(study: Study, copy: Path, content: str) -> None:
    file = copy / "losses" / "order-2" / "held_out.json"
    before = file.read_bytes()
    file.write_text(content)
    measured = Measurer(study, copy, material(study, copy), quiet).measured(trained(study))
    assert file.read_bytes() == before
    assert np.isfinite(measured[2].held_out.total).all()


def test_controls_and_precision_are_part_of_the_study(config: Path, copy: Path, tmp_path: Path) -> None:
    before = load(copy / "results.json")
    changed = configure(
        tmp_path,
        data=before.study.data.model_dump(),
        base=before.study.base.model_dump(exclude_none=True),
        controls=["ties", "stretch-1.5", "longer"],
        measuring={"bins": 3, "bootstrap": 20, "batch_size": 4, "precision": "bf16"},
    )
    result = invoke(changed, copy)
    assert result.exit_code == 0, result.output
    found = load(copy / "results.json")
    assert [row.label for row in found.table][-3:] == ["longer", "ties", "stretch-1.5"]
    assert {"longer", "stretch-1.5"} <= {one.against for one in found.differences if one.row == "average"}
    assert found.models[0]["loss"] == pytest.approx(before.models[0]["loss"], rel=0.02)
    assert found.models[0]["loss"] != before.models[0]["loss"]
    assert (
        json.loads((copy / "models" / "longer" / "made.json").read_text())["made_from"]["run"]["training"]["epochs"]
        == 4
    )
    # The average at 1.5 times its distance from the base, up to what rounding to bf16 leaves.
    base, average, stretched = (
        bits(copy / place).view(torch.bfloat16).float()
        for place in ("models/base", "merges/average", "merges/stretch-1.5")
    )
    assert float((stretched - base).norm() / (average - base).norm()) == pytest.approx(1.5, rel=0.1)


def test_one_order_and_few_steps_make_a_study_too(config: Path, tmp_path: Path) -> None:
    study = load_study(config)
    tuning = {**study.fine_tuning.model_dump(), "max_steps": 7}  # of 10: the second epoch is not completed
    changed = configure(
        tmp_path,
        data=study.data.model_dump(),
        base=study.base.model_dump(exclude_none=True),
        fine_tuning=tuning,
        orders=[2],
        checkpoints=0,
        measuring={"bins": 3, "bootstrap": 20},
    )
    result = invoke(changed, tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = load(tmp_path / "out" / "results.json")
    assert (found.steps, [trend.epoch for trend in found.trends], found.anchor) == (7, ["first"], None)
    assert [row.label for row in found.table] == ["base", "sub-models, mean", "sub-models, best (order-2)"]


def test_the_default_folder_is_named_after_the_configuration(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, int, str | None]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        throws_module, "run_study", lambda study, root, report, jobs, ray: asked.append((root, jobs, ray))
    )
    assert CliRunner().invoke(main, [str(config)]).exit_code == 0
    assert CliRunner().invoke(main, [str(config), "--jobs", "3"]).exit_code == 0
    assert CliRunner().invoke(main, [str(config), "--ray", "auto"]).exit_code == 0
    assert asked == [(Path("runs/tiny"), 1, None), (Path("runs/tiny"), 3, None), (Path("runs/tiny"), 1, "auto")]
    result = CliRunner().invoke(main, [str(config), "--jobs", "0"])
    assert result.exit_code == 2
