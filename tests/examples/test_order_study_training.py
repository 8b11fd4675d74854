"""The order study's training on minuscule models: resumed, in every precision, with LoRA, of any base, in parallel."""

import errno
import json
import logging
import os
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from examples.order_study import parallel
from examples.order_study.config import load_study
from examples.order_study.data.parts import read_parts
from examples.order_study.data.samples import load_tokenizer
from examples.order_study.errors import StudyError
from examples.order_study.measure.weights import compare
from examples.order_study.model import trained as models_of
from examples.order_study.settings import (
    Architecture,
    FreshBase,
    GivenBase,
    Lora,
    Measuring,
    Merging,
    Study,
    Training,
)
from examples.order_study.sources import JsonLines, TextFile
from examples.order_study.store.folders import writing
from examples.order_study.train import trainer
from examples.order_study.train.models import Trained, kept_steps, train_models
from examples.order_study.train.states import folder_of

Progress = trainer._Progress
SAMPLES = 22
STEPS = 6  # two epochs of three batches, the last of which is smaller
TUNING = Training(epochs=2, learning_rate=1e-2, warmup_steps=1, weight_decay=0.1, save_steps=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums in words, of different lengths; one of them is longer than any context here."""
    folder = tmp_path_factory.mktemp("data")
    numbers = ["one", "two", "three", "four", "five", "six"]
    pairs = [(a, b) for a in range(6) for b in range(6)]
    lines = [
        json.dumps({"question": f"{numbers[a]} and {numbers[b]}", "answer": f"{numbers[b]} after {numbers[a]}"})
        for a, b in pairs[:SAMPLES]
    ]
    long = json.dumps({"question": "and " * 100, "answer": "long"})
    (folder / "train.jsonl").write_text("\n".join([*lines[:4], long, *lines[4:]]) + "\n")
    (folder / "test.jsonl").write_text(json.dumps({"question": "six and six", "answer": "six after six"}) + "\n")
    (folder / "base.txt").write_text("\n\n".join(f"{a} and {b} or {b} after {a}" for a in numbers for b in numbers))
    return folder


@pytest.fixture(scope="module")
def fresh(data: Path) -> Study:
    """A study of a base of its own."""
    architecture = Architecture(
        vocab_size=270,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    base = FreshBase(
        architecture=architecture,
        training=Training(epochs=1, learning_rate=1e-2, warmup_steps=0),
        text=(TextFile(path=str(data / "base.txt"), passage_characters=60),),
    )
    return Study(data=sums(data), base=base, fine_tuning=TUNING, orders=(1, 2))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another architecture: fp32, tied weights, dropout, no start token and none for padding."""
    folder = tmp_path_factory.mktemp("gpt2")
    bpe = Tokenizer(BPE({c: i for i, c in enumerate([*ByteLevel.alphabet(), "<end>"])}, []))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(folder)
    return folder


def sums(data: Path) -> JsonLines:
    return JsonLines(
        source="jsonl",
        train=str(data / "train.jsonl"),
        held_out=str(data / "test.jsonl"),
        prompt="{question} is",
        response=" {answer}",
    )


def changed(study: Study, **tuning: Any) -> Study:
    return study.model_copy(update={"fine_tuning": study.fine_tuning.model_copy(update=tuning)})


def quiet(_: str) -> None:
    """Report nothing."""


def train_study(study: Study, out: Path, report: Callable[[str], None], jobs: int = 1) -> Trained:
    return train_models(study, out, read_parts(study), report, jobs)


def trained(study: Study, out: Path, jobs: int = 1) -> dict[str, str]:
    """Run a study and return what was done for each model."""
    lines: list[str] = []
    train_study(study, out, lines.append, jobs)
    return {Path(place).name: note for place, note in (line.split(": ", 1) for line in lines)}


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def scratch(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.endswith(".unfinished")]


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Makes the training of a model end after a step, as Ctrl-C would; a step of 0 lets it run."""

    def cut(name: str, step: int) -> None:
        class Ending(Progress):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                super().on_step_end(args, state, control, **kwargs)
                if self._name == name and state.global_step == step:
                    raise KeyboardInterrupt

        monkeypatch.setattr(trainer, "_Progress", Ending)

    return cut


@pytest.fixture
def trainer_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers' Trainer warns of; transformers keeps its log from pytest, and other tests quieten it."""
    logger = logging.getLogger("transformers.trainer")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


# Resuming


VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "accumulated": {"gradient_accumulation": 2, "gradient_checkpointing": True},
    "lora in bf16": {"lora": Lora(rank=2, dropout=0.3), "precision": "bf16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_training_gives_the_same_bits(
    gpt2: Path,
    data: Path,
    tmp_path: Path,
    variant: str,
    cut_off: Callable[[str, int], None],
    trainer_log: pytest.LogCaptureFixture,
) -> None:
    """GPT-2 has dropout, so the random state must be that of an uninterrupted training too; its head is tied."""
    base = Study(data=sums(data), base=GivenBase(model=str(gpt2)), fine_tuning=TUNING, orders=(1, 2), checkpoints=2)
    study = changed(base, **VARIANTS[variant])
    assert trained(study, tmp_path / "whole")["order-1"].startswith("trained in")
    out = tmp_path / "cut"
    for step in (2, 4, 5):  # within the first epoch, at its end, within the second
        cut_off("order-2", step)
        with pytest.raises(KeyboardInterrupt):
            train_study(study, out, quiet)
    cut_off("", 0)
    notes = trained(study, out)
    assert notes["order-1"] == "reused"
    assert notes["order-2"].partition(";")[0].endswith(", resumed after step 4")
    assert weights(out) == weights(tmp_path / "whole")
    assert len(weights(out)) == (13 if "lora" in variant else 7)  # a base, two models, two states of each
    assert scratch(out) == []
    assert "keys in the checkpoint" not in trainer_log.text


def test_a_resumed_training_says_what_a_state_lacks(
    fresh: Study, tmp_path: Path, cut_off: Callable[[str, int], None], trainer_log: pytest.LogCaptureFixture
) -> None:
    cut_off("order-1", 5)
    with pytest.raises(KeyboardInterrupt):
        train_study(fresh, tmp_path, quiet)
    state = folder_of(tmp_path / "models" / "order-1") / "checkpoint-4" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(state).items() if "norm" not in name}, state)
    cut_off("", 0)
    train_study(fresh, tmp_path, quiet)
    assert "missing keys in the checkpoint model loaded: ['model.layers.0.input_layernorm.weight'" in trainer_log.text


def test_a_torn_state_is_passed_over_for_the_one_before(
    fresh: Study, tmp_path: Path, cut_off: Callable[[str, int], None]
) -> None:
    cut_off("order-1", 5)
    with pytest.raises(KeyboardInterrupt):
        train_study(fresh, tmp_path / "cut", quiet)
    states = folder_of(tmp_path / "cut" / "models" / "order-1")
    assert sorted(path.name for path in states.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    # Killed while it wrote: no mark, and a file that ends early.
    (states / "checkpoint-4" / "complete").unlink()
    optimizer = states / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    cut_off("", 0)
    assert trained(fresh, tmp_path / "cut")["order-1"].partition(";")[0].endswith(", resumed after step 3")
    train_study(fresh, tmp_path / "whole", quiet)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("spoilt", ["settings", "versions", "record", "none"])
def test_states_of_another_training_are_not_resumed_from(
    fresh: Study, tmp_path: Path, spoilt: str, cut_off: Callable[[str, int], None]
) -> None:
    cut_off("order-1", 4)
    with pytest.raises(KeyboardInterrupt):
        train_study(fresh, tmp_path / "cut", quiet)
    cut_off("", 0)
    record = folder_of(tmp_path / "cut" / "models" / "order-1") / "made.json"
    study = changed(fresh, learning_rate=2e-2) if spoilt == "settings" else fresh
    if spoilt == "versions":
        record.write_text(record.read_text().replace(torch.__version__, "1.0"))
    elif spoilt == "record":
        record.write_text("{")
    note = trained(study, tmp_path / "cut")["order-1"]
    assert ("resumed" in note) == (spoilt == "none")
    train_study(study, tmp_path / "whole", quiet)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_training_cut_off_before_its_first_state_leaves_nothing(
    fresh: Study, tmp_path: Path, cut_off: Callable[[str, int], None]
) -> None:
    cut_off("order-1", 2)
    with pytest.raises(KeyboardInterrupt):
        train_study(changed(fresh, save_steps=None), tmp_path, quiet)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["base"]


def test_a_full_disk_is_named_and_what_was_saved_is_kept(
    fresh: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(*arguments: Any, **keywords: Any) -> None:
        if "checkpoint-4" in str(arguments[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(StudyError, match="full") as caught:
            train_study(fresh, tmp_path, quiet)
    assert str(tmp_path) in str(caught.value)
    assert "run again, which goes on where it stopped" in str(caught.value)
    assert [path.name for path in folder_of(tmp_path / "models" / "order-1").glob("checkpoint-*")] != []
    assert trained(fresh, tmp_path)["order-1"].partition(";")[0].endswith(", resumed after step 3")


# States on the way


def test_states_on_the_way_are_checkpoints_of_their_own(fresh: Study, tmp_path: Path) -> None:
    study = fresh.model_copy(update={"checkpoints": 2})
    assert train_study(study, tmp_path, quiet).steps == kept_steps(study, SAMPLES) == (2, 4)
    for step in (2, 4):
        folder = tmp_path / "models" / "steps" / f"{step:06d}" / "order-1"
        assert json.loads((folder / "made.json").read_text())["made_from"]["step"] == step
        assert f"state after {step} steps" in (folder / "README.md").read_text()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        final, state = (
            load_file(tmp_path / "models" / "order-1" / "model.safetensors"),
            load_file(folder / "model.safetensors"),
        )
        assert final.keys() == state.keys()
        assert any(not torch.equal(final[name], state[name]) for name in final)
    # The models themselves are those of a study that keeps none.
    train_study(fresh, tmp_path / "none", quiet)
    one, other = (weights(folder / "models" / "order-2") for folder in (tmp_path, tmp_path / "none"))
    assert one == other
    assert kept_steps(fresh, SAMPLES) == ()


def test_states_that_are_missing_are_made_again_without_other_bits(fresh: Study, tmp_path: Path) -> None:
    study = fresh.model_copy(update={"checkpoints": 2})
    train_study(study, tmp_path, quiet)
    before = weights(tmp_path)
    shutil.rmtree(tmp_path / "models" / "steps" / "000002" / "order-2")
    assert trained(study, tmp_path)["order-2"].startswith("trained in")
    assert weights(tmp_path) == before
    # Fewer of them are there already; more of them ask for training.
    assert set(trained(fresh, tmp_path).values()) >= {"reused"}
    assert trained(fresh.model_copy(update={"checkpoints": 5}), tmp_path)["order-1"].startswith("trained in")


def test_other_settings_discard_the_states_on_the_way(fresh: Study, tmp_path: Path) -> None:
    train_study(fresh.model_copy(update={"checkpoints": 2}), tmp_path, quiet)
    train_study(changed(fresh, weight_decay=0.0), tmp_path, quiet)
    assert weights(tmp_path / "models" / "steps") == {}


# What decides bits and what does not


def test_settings_that_decide_nothing_retrain_nothing(fresh: Study, tmp_path: Path) -> None:
    train_study(fresh, tmp_path, quiet)
    other = changed(fresh, save_steps=7).model_copy(
        update={"merging": Merging(seeds=(5,)), "measuring": Measuring(bins=3)}
    )
    notes = trained(other, tmp_path)
    assert [notes[name] for name in ("base", "order-1", "order-2")] == ["reused"] * 3


def test_several_at_once_give_the_same_bits(fresh: Study, tmp_path: Path) -> None:
    """A process of its own has no traces of the base's training, which was in another precision."""
    study = changed(fresh, precision="bf16_mixed").model_copy(update={"checkpoints": 1})
    train_study(study, tmp_path / "one", quiet)
    notes = trained(study, tmp_path / "two", jobs=2)
    assert notes["order-1"].startswith("trained in")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def test_an_error_in_a_process_of_its_own_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"a model needs a tokenizer, but .*none has none"):
        list(parallel.each(load_tokenizer, [(tmp_path / "none",)] * 2, 2))


def test_a_process_that_is_killed_is_named() -> None:
    with pytest.raises(StudyError, match="but one was ended from outside, most often for lack of memory"):
        list(parallel.each(os.abort, [(), ()], 2))


def test_pure_bf16_leaves_more_parameters_equal_to_the_base(fresh: Study, tmp_path: Path) -> None:
    shares = {}
    for precision in ("fp32", "bf16_mixed", "bf16"):
        out = tmp_path / precision
        train_study(changed(fresh, precision=precision, learning_rate=1e-4, weight_decay=0.0), out, quiet)
        shares[precision] = compare(out / "models" / "order-1", out / "models" / "base")[0]
        record = json.loads((out / "models" / "order-1" / "made.json").read_text())["made_from"]["run"]["training"]
        assert (record["precision"], record["weight_decay"], record["saved_as"]) == (precision, 0.0, "bf16")
    assert shares["bf16"] > shares["fp32"] > 0
    assert shares["bf16"] > shares["bf16_mixed"] > 0
    assert (
        len({(tmp_path / precision / "models" / "order-1" / "model.safetensors").read_bytes() for precision in shares})
        == 3
    )


def test_the_card_tells_precision_weight_decay_and_order(fresh: Study, tmp_path: Path) -> None:
    train_study(changed(fresh, precision="bf16_mixed"), tmp_path, quiet)
    card = (tmp_path / "models" / "order-2" / "README.md").read_text()
    assert "- **Order seed: 2**" in card
    assert "weight decay 0.1" in card
    assert "- Precision: weights in fp32, arithmetic in bf16 (autocast), saved as bf16" in card


def test_saved_as_fp32_base_and_sub_models_are(fresh: Study, tmp_path: Path) -> None:
    assert isinstance(fresh.base, FreshBase)
    base = fresh.base.model_copy(update={"training": fresh.base.training.model_copy(update={"saved_as": "fp32"})})
    study = changed(fresh, saved_as="fp32").model_copy(update={"base": base})
    train_study(study, tmp_path, quiet)
    for name in ("base", "order-1"):
        assert {t.dtype for t in load_file(tmp_path / "models" / name / "model.safetensors").values()} == {
            torch.float32
        }
    assert compare(tmp_path / "models" / "order-1", tmp_path / "models" / "base")[0] < 0.2


# LoRA


def test_an_adapter_is_merged_into_the_weights_and_kept_beside(fresh: Study, tmp_path: Path) -> None:
    study = changed(fresh, lora=Lora(rank=2, alpha=8.0, target_modules=("q_proj", "up_proj")))
    train_study(study, tmp_path, quiet)
    base = load_file(tmp_path / "models" / "base" / "model.safetensors")
    merged = load_file(tmp_path / "models" / "order-1" / "model.safetensors")
    adapter = load_file(tmp_path / "models" / "order-1" / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    adapted = {name for name in base if "q_proj" in name or "up_proj" in name}
    for name, weight in base.items():
        if name not in adapted:
            assert torch.equal(merged[name].view(torch.int16), weight.view(torch.int16))
            continue
        a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"].float() for x in "AB")
        assert torch.equal(merged[name], (weight.float() + 4 * (b @ a)).bfloat16())
        assert not torch.equal(merged[name], weight)
    config = json.loads((tmp_path / "models" / "order-1" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["target_modules"]) == (None, ["q_proj", "up_proj"])
    assert "LoRA in fp32 of rank 2, alpha 8, dropout 0" in (tmp_path / "models" / "order-1" / "README.md").read_text()
    for path in (tmp_path / "models" / "order-1").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


# A base that is given


def test_any_causal_language_model_is_a_base(gpt2: Path, data: Path, tmp_path: Path) -> None:
    source = {path.name: path.read_bytes() for path in gpt2.iterdir()}
    study = Study(data=sums(data), base=GivenBase(model=str(gpt2)), fine_tuning=TUNING, orders=(3, 4))
    assert trained(study, tmp_path)["base"] == f"saved from {gpt2}"
    base = load_file(tmp_path / "models" / "base" / "model.safetensors")
    original = load_file(gpt2 / "model.safetensors")
    assert base.keys() == original.keys()  # tied weights are still one tensor
    assert all(torch.equal(base[name], original[name].bfloat16()) for name in base)
    for name in ("base", "order-3"):
        config = json.loads((tmp_path / "models" / name / "tokenizer_config.json").read_text())
        assert config.get("pad_token") is None
    assert {path.name: path.read_bytes() for path in gpt2.iterdir()} == source
    assert compare(tmp_path / "models" / "order-3", tmp_path / "models" / "base")[0] < 1
    assert set(trained(study, tmp_path).values()) >= {"reused"}
    assert "trained" not in str(trained(study, tmp_path))


def test_a_given_base_that_changes_is_taken_anew(gpt2: Path, data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(gpt2, source)
    study = Study(data=sums(data), base=GivenBase(model=str(source)), fine_tuning=TUNING, orders=(1, 2))
    train_study(study, tmp_path / "out", quiet)
    (source / "README.md").write_text("no part of the model")
    assert "trained" not in str(trained(study, tmp_path / "out"))
    shutil.rmtree(source)  # the study has a copy
    assert "trained" not in str(trained(study, tmp_path / "out"))
    shutil.copytree(gpt2, source)
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    model.save_pretrained(source)
    assert trained(study, tmp_path / "out")["order-1"].startswith("trained in")


def test_a_base_without_a_tokenizer_is_refused(gpt2: Path, data: Path, tmp_path: Path, fresh: Study) -> None:
    train_study(fresh, tmp_path / "fresh", quiet)
    for name, source in (("gpt2", gpt2), ("llama", tmp_path / "fresh" / "models" / "base")):
        bare = tmp_path / name
        shutil.copytree(source, bare)
        for path in bare.glob("tokenizer*"):
            path.unlink()
        study = Study(data=sums(data), base=GivenBase(model=str(bare)), fine_tuning=TUNING)
        with pytest.raises(StudyError, match=f"a model needs a tokenizer, but {bare} has"):
            train_study(study, tmp_path / "out", quiet)
    assert not (tmp_path / "out" / "base").exists()


def test_a_base_of_packed_weights_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "base.Q4_1.gguf").touch()
    study = Study(data=sums(data), base=GivenBase(model=str(tmp_path)), fine_tuning=TUNING)
    with pytest.raises(StudyError, match=f"but {tmp_path} holds GGUF weights: load these with .*dequantised"):
        train_study(study, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there_is_refused(data: Path, tmp_path: Path) -> None:
    study = Study(data=sums(data), base=GivenBase(model=str(tmp_path / "none")), fine_tuning=TUNING)
    with pytest.raises(StudyError, match=r"but there is no folder .*/none: correct base\.model"):
        train_study(study, tmp_path / "out", quiet)
    assert not (tmp_path / "out" / "base").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(gpt2: Path, data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(gpt2, source)
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(source)
    study = Study(data=sums(data), base=GivenBase(model=str(source)), fine_tuning=TUNING)
    with pytest.raises(StudyError, match="has 258 tokens for 257 rows of the embedding: resize the embedding"):
        train_study(study, tmp_path / "out", quiet)


# Samples that are too long


def test_samples_that_are_too_long_are_left_out_counted_and_reported(fresh: Study, tmp_path: Path) -> None:
    lines: list[str] = []
    done = train_study(fresh, tmp_path, lines.append)
    assert [line for line in lines if "left out" in line] == [
        f"{tmp_path / 'models'}: 1 of {SAMPLES + 1} samples of the fine_tuning part are left out, as they have more "
        "than 64 tokens"
    ]
    assert len(done.samples["fine_tuning"].samples) == len(done.samples["fine_tuning"].responses) == SAMPLES
    assert {part: some.left_out for part, some in done.samples.items()} == {"base": 0, "fine_tuning": 1, "held_out": 0}


def test_samples_all_of_which_are_too_long_are_refused(fresh: Study, tmp_path: Path) -> None:
    assert isinstance(fresh.data, JsonLines)
    study = fresh.model_copy(update={"data": fresh.data.model_copy(update={"prompt": "{question}" + "and " * 99})})
    with pytest.raises(StudyError, match=r"64 tokens, but none of the 23 of the fine_tuning part does: shorten"):
        train_study(study, tmp_path, quiet)


# Reuse


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the training itself, where a test asks only which models would be trained."""
    monkeypatch.setattr("examples.order_study.train.models.trainer.train", lambda *_: (0, []))


@pytest.fixture(scope="module")
def finished(fresh: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "study"
    train_study(fresh, out, quiet)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "copy")


def retrained(study: Study, out: Path) -> set[str]:
    return {name for name, note in trained(study, out).items() if note.startswith("trained in")}


@pytest.mark.usefixtures("no_training")
def test_only_what_depends_on_a_change_is_trained_again(fresh: Study, copy: Path) -> None:
    assert retrained(fresh, copy) == set()
    assert retrained(fresh.model_copy(update={"orders": (1, 4)}), copy) == {"order-4"}
    assert retrained(changed(fresh, epochs=1), copy) == {"order-1", "order-2"}
    other = fresh.model_copy(update={"base": fresh.base.model_copy(update={"order": 9})})
    assert retrained(other, copy) == {"base", "order-1", "order-2"}


def test_a_damaged_or_half_written_model_is_trained_again(fresh: Study, copy: Path, finished: Path) -> None:
    file = copy / "models" / "order-2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    (copy / "models" / "order-1").rename(copy / "models" / ".order-1.unfinished")  # as a killed process leaves it
    assert retrained(fresh, copy) == {"order-1", "order-2"}
    assert weights(copy) == weights(finished)
    assert scratch(copy) == []


def test_sub_models_of_a_base_to_be_replaced_go_first(
    fresh: Study, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.order_study.train.models.trainer.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_study(fresh.model_copy(update={"base": fresh.base.model_copy(update={"order": 9})}), copy, quiet)
    assert list((copy / "models").iterdir()) == []


def test_a_folder_of_someone_else_is_not_touched(fresh: Study, tmp_path: Path) -> None:
    precious = tmp_path / "models" / "order-2" / "model.safetensors"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    with pytest.raises(StudyError, match=r"but .*order-2 has no made\.json that says so: move it away, or choose"):
        train_study(fresh, tmp_path, quiet)
    assert precious.read_bytes() == b"precious"
    assert not (tmp_path / "models" / "base").exists()


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with writing(folder) as unfinished:
        (unfinished / "file").write_text("old")

    def fail() -> None:
        with writing(folder) as unfinished:
            (unfinished / "file").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["old"]


def test_sub_models_differ_in_order_alone(fresh: Study, finished: Path) -> None:
    names = [model.name for model in models_of(fresh) if model.kind == "sub-model"]
    made = [json.loads((finished / "models" / name / "made.json").read_text())["made_from"] for name in names]
    assert [(one["run"].pop("name"), one["run"].pop("order")) for one in made] == [("order-1", 1), ("order-2", 2)]
    assert made[0] == made[1]


# Progress


def test_a_line_tells_step_loss_pace_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 5.0, 10.0, 30.0, 60.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress, state = Progress("order-1"), types.SimpleNamespace(global_step=0, max_steps=8)
    progress.on_train_begin(None, state, None)
    for state.global_step, loss in enumerate([5.0, 4.0, 3.0, 1.0], start=1):
        progress.on_log(None, state, None, logs={"loss": loss})
    progress.on_log(None, state, None, logs={"train_runtime": 60.0})
    assert capsys.readouterr().err.splitlines() == [
        "training order-1: step 3 of 8, loss 4.0000, 10.00 s a step, 50 s left",
        "training order-1: step 4 of 8, loss 1.0000, 15.00 s a step, 60 s left",
    ]


def test_the_configuration_for_llama_takes_its_first_steps(data: Path, fresh: Study, tmp_path: Path) -> None:
    """With a Llama of the same class and with data of the same form, all other settings as they stand."""
    root = Path(__file__).parents[2]
    content = yaml.safe_load((root / "examples" / "order_study" / "configs" / "llama.yaml").read_text())
    train_models(fresh, tmp_path / "fresh", read_parts(fresh), print)
    assert AutoConfig.from_pretrained(tmp_path / "fresh" / "models" / "base").model_type == "llama"
    content["base"]["model"] = str(tmp_path / "fresh" / "models" / "base")
    lines = (data / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join((lines[:4] * 20)[:64]) + "\n")
    files = {"train": str(tmp_path / "train.jsonl"), "held_out": str(data / "test.jsonl")}
    content["data"] = {"source": "jsonl", **files, **{key: content["data"][key] for key in ("prompt", "response")}}
    (tmp_path / "llama.yaml").write_text(yaml.safe_dump({**content, "orders": [1, 2]}))
    study = load_study(tmp_path / "llama.yaml")
    trained = train_models(study, tmp_path / "runs", read_parts(study), print)
    assert len(trained.samples["fine_tuning"].samples) == 64
    names = ("base", "order-1", "order-2")
    base, *models = (load_file(tmp_path / "runs" / "models" / name / "model.safetensors") for name in names)
    for model in models:
        assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16}
        assert model.keys() == base.keys()
        assert any(not tensor.equal(base[name]) for name, tensor in model.items())
