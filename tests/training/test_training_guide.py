"""docs/training.md: its scripts give sub-models that differ in order only, and the traps it names are traps."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.support.pages import blocks, commands, typed

pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers", minversion="5")

PAGE = "docs/training.md"
ORDERS = (1000, 2000, 3000)
WORDS = [f"w{number}" for number in range(60)]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Trainer and datasets report to the terminal, and warn about what this page does not use."""
    import datasets

    datasets.disable_progress_bars()
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ./base and train.jsonl, as the page's scripts expect them, and no accelerator."""
    import tokenizers

    vocabulary = {token: number for number, token in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped: Any = transformers.PreTrainedTokenizerFast
    wrapped(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>").save_pretrained(
        tmp_path / "base"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        pad_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    source = random.Random(0)
    rows = [{"text": " ".join(source.choices(WORDS, k=source.randint(4, 12)))} for _ in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def run(code: str) -> None:
    """Execute a block of the page; what it prints is of no interest."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        exec(compile(code, PAGE, "exec"), {})


def inspected(recipe: Path) -> dict[str, Any]:
    """Return the report of ``mergekit-select inspect``."""
    report: dict[str, Any] = json.loads(typed(f"mergekit-select inspect {recipe} --json --quiet"))
    return report


def looks_as_promised(folder: Path) -> None:
    """Check what the page's last section says of ``inspect`` for the sub-models in ./models."""
    recipe = folder / "orders.yml"
    recipe.write_text(blocks(PAGE, "yaml", "Look at them and merge them")[0], encoding="utf-8")
    report = inspected(recipe)
    distances = report["total"]["norms"]["task_vector"]
    assert min(distances) > 0
    assert max(distances) < 1.5 * min(distances)
    assert len(report["pairs"]) == 3
    assert max(report["total"]["shares"]["agreement"]) < 0.97


def weights(order: int, models: Path = Path("models")) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(models / f"order-{order}" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_script_for_transformers(folder: Path) -> None:
    run(blocks(PAGE, "python", "transformers Trainer")[0])
    assert {value.dtype for value in weights(1000).values()} == {torch.float32}
    looks_as_promised(folder)


def test_the_script_for_trl(folder: Path) -> None:
    pytest.importorskip("trl", minversion="1.0")
    run(blocks(PAGE, "python", "TRL SFTTrainer")[0])
    assert {value.dtype for value in weights(1000).values()} == {torch.float32}
    looks_as_promised(folder)
    _, *merging = commands(PAGE)  # the first is torchtune's
    checked, _, _, verified = map(typed, merging)
    assert checked.splitlines()[-1].startswith("this merge would work: 0 errors, ")
    assert verified.startswith("SAME")


def test_the_script_that_shuffles_files(folder: Path) -> None:
    run(blocks(PAGE, "python", "Any other trainer")[0])
    samples = Path("train.jsonl").read_text().splitlines()
    shuffled = [Path(f"train-{order}.jsonl").read_text().splitlines() for order in ORDERS]
    assert all(sorted(lines) == sorted(samples) for lines in shuffled)
    assert len({tuple(lines) for lines in [samples, *shuffled]}) == 4


def test_the_script_that_makes_a_first_adapter(folder: Path) -> None:
    pytest.importorskip("peft")
    code = blocks(PAGE, "python", "LoRA")[0]
    found = []
    for _ in range(2):
        run(code)
        found.append(safetensors.torch.load_file("first-adapter/adapter_model.safetensors"))
    assert same(*found)
    assert any(value.count_nonzero() for name, value in found[0].items() if "lora_A" in name)


# --- the traps


def trained(*, stream: bool = False, **arguments: Any) -> dict[str, torch.Tensor]:
    """Train ./base with the page's script for transformers, one run, other arguments."""
    import datasets

    tokenizer = transformers.AutoTokenizer.from_pretrained("./base")
    data = datasets.load_dataset("json", data_files="train.jsonl", split="train")
    data = data.map(lambda row: tokenizer(row["text"]), remove_columns=data.column_names)
    model = transformers.AutoModelForCausalLM.from_pretrained("./base", dtype="float32")
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir="runs",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            **{"max_steps": 10, "seed": 0, **arguments},
        ),
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=data.to_iterable_dataset() if stream else data,
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_data_seed_changes_the_model_and_seed_alone_gives_the_same_order(folder: Path) -> None:
    first = trained(data_seed=1000)
    assert same(first, trained(data_seed=1000))
    assert not same(first, trained(data_seed=2000))
    assert same(first, trained(seed=1000))  # no dropout in this model, so only the order could differ


@pytest.mark.parametrize(
    "setting",
    [{"train_sampling_strategy": "group_by_length"}, {"train_sampling_strategy": "sequential"}, {"stream": True}],
    ids=["group_by_length", "sequential", "stream"],
)
def test_what_defeats_data_seed(folder: Path, setting: dict[str, Any]) -> None:
    assert same(trained(data_seed=1000, **setting), trained(data_seed=2000, **setting))


def test_seeds_that_are_neighbours_share_their_orders() -> None:
    from accelerate.data_loader import SeedableRandomSampler

    def epochs(seed: int) -> list[list[int]]:
        sampler = SeedableRandomSampler(range(50), generator=None, data_seed=seed)
        return [list(sampler) for _ in range(3)]

    assert epochs(1)[1:] == epochs(2)[:2]
    far = [tuple(order) for seed in ORDERS for order in epochs(seed)]
    assert len(set(far)) == len(far)


def test_a_trl_adapter_begins_with_weights_that_depend_on_seed_alone(folder: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.0")
    peft = pytest.importorskip("peft")
    import datasets

    data = datasets.load_dataset("json", data_files="train.jsonl", split="train")

    def first_weights(**seeds: int) -> dict[str, torch.Tensor]:
        arguments = trl.SFTConfig(output_dir="runs", bf16=False, report_to="none", **seeds)
        trainer = trl.SFTTrainer(
            "./base", arguments, train_dataset=data, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"])
        )
        return {name: value for name, value in trainer.model.state_dict().items() if "lora_A" in name}

    start = first_weights(seed=0, data_seed=1000)
    assert start
    assert same(start, first_weights(seed=0, data_seed=2000))
    assert not same(start, first_weights(seed=1, data_seed=1000))


def test_trl_packs_the_same_samples_together_whatever_the_seed(folder: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.0")
    import datasets

    data = datasets.load_dataset("json", data_files="train.jsonl", split="train")

    def packs(order: int) -> list[list[int]]:
        arguments = trl.SFTConfig(
            output_dir="runs", bf16=False, report_to="none", packing=True, max_length=32, data_seed=order
        )
        packed: list[list[int]] = trl.SFTTrainer("./base", arguments, train_dataset=data).train_dataset["input_ids"][:]
        return packed

    assert packs(1000) == packs(2000)
    assert 1 < len(packs(1000)) < len(data)


def test_a_cast_in_the_recipe_gives_the_bits_of_a_cast_before_saving(folder: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained("./base", dtype="float32")
    torch.manual_seed(1)
    for number in (1, 2):
        for parameter in base.parameters():
            parameter.data += 1e-3 * torch.randn(parameter.shape)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            model = transformers.LlamaForCausalLM(base.config).to(dtype)
            model.load_state_dict(base.state_dict())
            model.save_pretrained(folder / name / f"order-{number}")
    reports = []
    for name in ("float32", "bfloat16"):
        models = [{"model": f"./{name}/order-{number}"} for number in (1, 2)]
        recipe = folder / f"{name}.yml"
        recipe.write_text(
            json.dumps(
                {
                    "merge_method": "parameter_selection_resampling",
                    "base_model": "./base",
                    "models": models,
                    "dtype": "bfloat16",
                }
            )
        )
        reports.append(inspected(recipe)["total"])
    assert reports[0] == reports[1]
