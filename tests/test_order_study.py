"""The order study on a minuscule setting: its text, its orders, its checkpoints and its table."""

import json
import math
import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from order_study import study as study_module
from order_study import text, tokens, training
from order_study.checkpoints import Origin
from order_study.cli import main
from order_study.compare import compare, table
from order_study.errors import StudyError
from order_study.example import Example
from order_study.folders import file_digest, writing
from order_study.order import OrderedBatches, permutation
from order_study.settings import PARTS, Architecture, FreshBase, Study, Training
from order_study.sources import Text
from order_study.states import States
from order_study.study import train_study
from order_study.tokens import encode, train_tokenizer
from order_study.weights import share_equal

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODELS = ("base", "order-1", "order-2", "order-3")
ARCHITECTURE = Architecture(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=400,
)
BASE = FreshBase(architecture=ARCHITECTURE, training=Training(epochs=1, learning_rate=1e-2, warmup_steps=0))
TINY = Study(
    data=Text(topics=1),
    base=BASE,
    fine_tuning=Training(epochs=2, learning_rate=1e-3, warmup_steps=0),
)


def quiet(_: str) -> None:
    """Report nothing."""


def plain(*passages: str) -> list[Example]:
    """Passages as examples without a prompt."""
    return [Example("", passage) for passage in passages]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def retrained(out: Path, study: Study) -> set[str]:
    """Run a study and return the names of the models that were trained, not reused."""
    lines: list[str] = []
    train_study(study, out, lines.append)
    return {Path(line.split(": ")[0]).name for line in lines if ": trained in " in line}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "models"
    assert retrained(folder, TINY) == set(MODELS)
    return folder


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """A copy of the finished study that a test may spoil."""
    for path, content in contents(out).items():
        target = tmp_path / "models" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return tmp_path / "models"


# Text


def test_parts_hold_every_passage_once() -> None:
    parts = text.split(Text())
    passages = text.cut(text.pydoc_topics.topics, Text())
    assert Counter(passages) == Counter(p for part in PARTS for p in parts[part])
    assert len(set(passages)) == len(passages)


def test_no_run_of_eight_words_occurs_in_two_parts() -> None:
    seen: dict[tuple[str, ...], str] = {}
    for part, passages in text.split(Text()).items():
        for passage in passages:
            words = re.findall(r"\w+", passage.lower())
            for start in range(len(words) - 7):
                run = tuple(words[start : start + 8])
                assert seen.setdefault(run, part) == part, f"{' '.join(run)!r} occurs in {seen[run]} and {part}"


def test_no_paragraph_of_the_source_is_lost() -> None:
    kept = {" ".join(line.split()) for part in text.split(Text()).values() for p in part for line in p.split("\n")}
    lost = {
        line
        for topic in text.pydoc_topics.topics.values()
        for line in (" ".join(line.split()) for line in topic.split("\n"))
        if line and len(line) <= Text().passage_characters
    } - kept
    assert not lost


def test_parts_have_about_the_shares_asked_for() -> None:
    size = {part: sum(map(len, passages)) for part, passages in text.split(Text()).items()}
    share = {part: size[part] / sum(size.values()) for part in PARTS}
    assert share == pytest.approx({"base": 0.45, "fine_tuning": 0.4, "held_out": 0.15}, abs=0.05)


def test_passages_keep_to_the_limit_and_long_lines_are_cut() -> None:
    passages = text.join(["one", "two", "x" * 25, "four\nfive\nsix and seven"], 10)
    assert passages == ["one\n\ntwo", "x" * 10, "x" * 10, "x" * 5, "four\nfive", "six and se", "ven"]


def test_passages_that_share_eight_words_are_one_group() -> None:
    words = list("abcdefghij")
    passages = [" ".join(words[:8]), "nothing shared", " ".join(words), "z " + " ".join(words[2:]), "y"]
    assert text.groups(passages) == [0, 1, 0, 0, 4]


def test_a_changed_passage_moves_no_other() -> None:
    before, after = {"t": "\n\n".join(f"{i} {'x' * 350}{i}" for i in range(99))}, {}
    after["t"] = before["t"].replace("50 x", "50 y", 1)
    assert before != after

    def part_of(topics: dict[str, str]) -> dict[str, str]:
        passages = text.cut(topics, Text())
        return {p: text._part(passages[g], Text()) for g, p in zip(text.groups(passages), passages, strict=True)}

    old, new = part_of(before), part_of(after)
    common = old.keys() & new.keys()
    assert len(common) == 98
    assert all(old[p] == new[p] for p in common)


def test_no_text_to_hold_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"base \+ held_out must stay below 1, got 0\.9 \+ 0\.2: lower one"):
        Text(base=0.9, held_out=0.2)


# Tokens


def test_tokenizer_gives_every_text_back() -> None:
    tokenizer = train_tokenizer(["some text to learn from " * 5], 300, 100)
    for sample in ["some text", "  def f():\n\treturn 'ü → 🙂'\n"]:
        ids = tokenizer(sample)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == sample


def test_a_passage_beyond_the_context_is_left_out_not_cut() -> None:
    tokenizer = train_tokenizer(["abc"], 300, 8)
    encoded = encode(plain("zyxwvut", "zyxwvu", "zyxwvuts"), tokenizer, 8)
    assert [len(sample["input_ids"]) for sample in encoded.samples] == [8]
    assert encoded.left_out == [0, 2]


# Order


@pytest.mark.parametrize("samples", [0, 1, 2, 37, 500])
def test_each_epoch_is_a_permutation(samples: int) -> None:
    for seed in (0, 1, 2**32 - 1):
        for epoch in range(3):
            assert sorted(permutation(samples, seed, epoch)) == list(range(samples))


def test_orders_differ_between_seeds_and_epochs() -> None:
    orders = {tuple(permutation(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_never_changes() -> None:
    # From the shell: for i in 0 1 2 3 4 5 6 7; do echo $(printf 1/0/$i | sha256sum) $i; done | sort
    assert permutation(8, 1, 0) == [5, 1, 2, 0, 4, 7, 6, 3]
    batches = OrderedBatches(8, 1, batch_size=8, composition="redrawn")
    assert list(batches) == [permutation(8, 1, 0)]
    batches.sampler.set_epoch(1)
    assert list(batches) == [permutation(8, 1, 1)] != [permutation(8, 1, 0)]


def test_training_sees_each_sample_once_an_epoch_in_the_order_of_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [f"passage {i}" for i in range(13)]
    tokenizer = train_tokenizer(passages, 300, 40)
    samples = encode(plain(*passages), tokenizer, 40).samples
    seen: list[list[str]] = []

    class Watching(tokens.DataCollatorForSeq2Seq):
        def __call__(self, features: list[dict[str, list[int]]], return_tensors: None = None) -> object:
            seen.append([tokenizer.decode(f["input_ids"], skip_special_tokens=True) for f in features])
            return super().__call__(features, return_tensors)

    monkeypatch.setattr(tokens, "DataCollatorForSeq2Seq", Watching)
    run = TINY.sub_runs()[1]
    model = training.fresh_model(ARCHITECTURE, tokenizer, 0)
    states = States(tmp_path / "model", Origin(run=run, text_sha256="", start_sha256=None), None)
    training.train(model, samples, tokenizer, run, states, training.Snapshots((), lambda *_: None))
    assert [len(batch) for batch in seen] == [8, 5, 8, 5]  # the small batch at the end is kept
    for epoch in range(2):
        shown = [passage for batch in seen[2 * epoch : 2 * epoch + 2] for passage in batch]
        assert shown == [passages[i] for i in permutation(13, run.order, epoch)]


def test_sub_models_differ_in_order_alone(out: Path) -> None:
    origins = [json.loads((out / name / "training.json").read_text())["origin"] for name in MODELS[1:]]
    assert [(o["run"].pop("name"), o["run"].pop("order")) for o in origins] == [(f"order-{i}", i) for i in (1, 2, 3)]
    assert origins[0] == origins[1] == origins[2]
    assert len({(out / name / "model.safetensors").read_bytes() for name in MODELS}) == 4


@pytest.mark.parametrize("orders", [(1,), (1, 2, 1)])
def test_fewer_than_two_different_orders_are_refused(orders: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"orders must be two or more different seeds, got {orders}")):
        Study(orders=orders)


# Training and its folders


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the training itself, where a test asks only which models would be trained."""
    monkeypatch.setattr(study_module, "train", lambda *_: None)


def test_two_runs_give_identical_bytes(out: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)  # nothing of the caller's state may matter
    random.seed(5)
    again = tmp_path / "again"
    assert retrained(again, TINY) == set(MODELS)
    assert contents(again) == contents(out)


def test_training_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with training.reproducible(1):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 1
    assert before == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


def test_a_second_run_reuses_everything(copy: Path) -> None:
    before = contents(copy)
    assert retrained(copy, TINY) == set()
    assert contents(copy) == before


@pytest.mark.usefixtures("no_training")
def test_a_changed_order_retrains_one_model(copy: Path) -> None:
    assert retrained(copy, TINY.model_copy(update={"orders": (1, 2, 4)})) == {"order-4"}


@pytest.mark.usefixtures("no_training")
def test_changed_settings_retrain_what_depends_on_them(copy: Path) -> None:
    longer = TINY.fine_tuning.model_copy(update={"epochs": 1})
    fine_tuned = TINY.model_copy(update={"fine_tuning": longer})
    assert retrained(copy, fine_tuned) == set(MODELS[1:])
    slower = BASE.training.model_copy(update={"learning_rate": 2e-2})
    other_base = fine_tuned.model_copy(update={"base": BASE.model_copy(update={"training": slower})})
    assert retrained(copy, other_base) == set(MODELS)


@pytest.mark.usefixtures("no_training")
def test_another_text_retrains_all(copy: Path) -> None:
    assert retrained(copy, TINY.model_copy(update={"data": Text(topics=1, passage_characters=380)})) == set(MODELS)


def test_a_damaged_model_is_trained_again(copy: Path) -> None:
    before = contents(copy)
    weights = copy / "order-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert retrained(copy, TINY) == {"order-2"}
    assert contents(copy) == before


@pytest.mark.usefixtures("no_training")
def test_sub_models_of_another_base_are_trained_again(copy: Path) -> None:
    base = copy / "base" / "model.safetensors"
    changed = base.read_bytes()[:-1] + b"\x01"
    base.write_bytes(changed)
    record = copy / "base" / "training.json"
    document = json.loads(record.read_text())
    document["weights_sha256"] = file_digest(base)
    record.write_text(json.dumps(document))
    assert retrained(copy, TINY) == set(MODELS[1:])


def test_a_folder_of_someone_else_is_not_touched(tmp_path: Path) -> None:
    precious = tmp_path / "order-2" / "model.safetensors"
    precious.parent.mkdir()
    precious.write_bytes(b"precious")
    with pytest.raises(StudyError) as caught:
        train_study(TINY, tmp_path, quiet)
    assert str(caught.value) == (
        f"a folder is only replaced if this program wrote it, but {precious.parent} has no training.json "
        "that says so: move it away, or choose another folder with --out"
    )
    assert precious.read_bytes() == b"precious"
    assert not (tmp_path / "base").exists()


def test_an_interrupted_run_leaves_nothing_finished_and_is_resumed(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study_module.checkpoints, "trained_card", interrupted)  # weights are written by then
        with pytest.raises(KeyboardInterrupt):
            train_study(TINY, folder, quiet)
    assert [path.name for path in folder.iterdir()] == ["text"]

    def cut_off_at(*arguments: Any) -> None:
        if arguments[3].name == "order-2":
            raise KeyboardInterrupt
        training.train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(study_module, "train", cut_off_at)
        with pytest.raises(KeyboardInterrupt):
            train_study(TINY, folder, quiet)
    assert sorted(path.name for path in folder.iterdir()) == ["base", "order-1", "text"]
    assert retrained(folder, TINY) == {"order-2", "order-3"}
    assert contents(folder) == contents(out)


def test_a_run_killed_while_it_wrote_is_cleaned_up_after(copy: Path, out: Path) -> None:
    # A killed process runs no cleaning-up of its own.
    (copy / "order-1").rename(copy / ".order-1.unfinished")
    assert retrained(copy, TINY) == {"order-1"}
    assert contents(copy) == contents(out)


def test_sub_models_of_a_base_to_be_replaced_go_first(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study_module, "train", interrupted)
    longer = BASE.training.model_copy(update={"epochs": 3})
    other = TINY.model_copy(update={"base": BASE.model_copy(update={"training": longer})})
    with pytest.raises(KeyboardInterrupt):
        train_study(other, copy, quiet)
    assert [path.name for path in copy.iterdir()] == ["text"]


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
    assert contents(tmp_path) == {"kept/file": b"old"}


# Checkpoints


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_loads_and_generates(out: Path, name: str) -> None:
    folder = out / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    prompt = tokenizer("The statement", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape[1] == prompt["input_ids"].shape[1] + 5
    assert tokenizer.decode(generated[0], skip_special_tokens=True).startswith("The statement")


@pytest.mark.parametrize("name", MODELS)
def test_safetensors_header_says_bf16(out: Path, name: str) -> None:
    content = (out / name / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} == {"BF16"}


def test_card_names_the_order_seed(out: Path) -> None:
    for seed in (1, 2, 3):
        assert f"**Order seed: {seed}**" in (out / f"order-{seed}" / "README.md").read_text()


def test_files_are_those_of_a_checkpoint_and_name_no_place(out: Path) -> None:
    names = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    for model in MODELS:
        files = contents(out / model)
        assert files.keys() == names
        assert not [name for name, content in files.items() if str(out).encode() in content]
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert files[file] == (out / "base" / file).read_bytes()


# Compare


def independent_loss(folder: Path, passages: list[str]) -> tuple[float, int]:
    """One passage at a time, one token at a time: no batches, no padding, no library loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    total, count = 0.0, 0
    for passage in passages:
        ids = [*tokenizer(passage)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        for position, following in enumerate(ids[1:]):
            total -= math.log(torch.softmax(logits[position], dim=0)[following])
            count += 1
    return total / count, count


def test_compare_prints_the_right_numbers(out: Path) -> None:
    result = CliRunner().invoke(
        main, ["compare", "--text", str(out / "text"), *(f"{name}={out / name}" for name in MODELS)]
    )
    assert result.exit_code == 0, result.output
    with (out / "text" / "held_out.jsonl").open(encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for line in file]
    assert passages == text.split(Text(topics=1))["held_out"]
    losses = {name: independent_loss(out / name, passages) for name in MODELS}
    lines = result.output.splitlines()
    assert lines[0] == f"held-out loss in nats per token, over {losses['base'][1]:,} tokens"
    assert lines[2].split() == ["model", "loss", "perplexity", "equal", "to", "base"]
    base = load_file(out / "base" / "model.safetensors")
    for line, name in zip(lines[3:], MODELS, strict=True):
        cells = line.split()
        assert cells[0] == name
        assert float(cells[1]) == pytest.approx(losses[name][0], abs=1e-4)
        assert float(cells[2]) == pytest.approx(math.exp(losses[name][0]), rel=1e-4)
        if name == "base":
            assert len(cells) == 3
        else:
            tensors = load_file(out / name / "model.safetensors")
            equal = sum(int((tensors[key].view(torch.int16) == base[key].view(torch.int16)).sum()) for key in base)
            assert cells[3] == f"{equal / sum(tensor.numel() for tensor in base.values()):.2%}"


def test_the_base_has_learnt_and_fine_tuning_helps(out: Path) -> None:
    rows = compare({name: out / name for name in MODELS}, out / "text")
    assert rows[0].held_out.loss < math.log(ARCHITECTURE.vocab_size) - 0.5
    assert all(row.held_out.loss < rows[0].held_out.loss for row in rows[1:])


def test_table_is_aligned(out: Path) -> None:
    rows = compare({"base": out / "base", "a longer name": out / "order-1"}, out / "text")
    lines = table(rows).splitlines()[2:]
    assert lines[0] == "model             loss  perplexity  equal to base"
    assert len(lines[2]) == len(lines[0])
    assert lines[1].index(".") == lines[2].index(".")


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [([1.0, 2.0], [1.0, 3.0], 0.5), ([-0.0], [0.0], 0.0), ([math.nan], [math.nan], 1.0)],
)
def test_equal_means_equal_bits(tmp_path: Path, one: list[float], other: list[float], share: float) -> None:
    for name, values in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(values).bfloat16()}, tmp_path / name / "model.safetensors")
    assert share_equal(tmp_path / "one", tmp_path / "other") == share


def test_sharded_weights_are_read_through_their_index(tmp_path: Path, out: Path) -> None:
    tensors = load_file(out / "base" / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert share_equal(tmp_path, out / "base") == 1.0


def test_weights_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    tensors = {
        "a": {"w": torch.zeros(2)},
        "b": {"w": torch.zeros(3)},
        "c": {"w": torch.zeros(2), "v": torch.zeros(1)},
    }
    for folder, held in tensors.items():
        (tmp_path / folder).mkdir()
        save_file(held, tmp_path / folder / "model.safetensors")
    a, b, c, none = (tmp_path / folder for folder in ("a", "b", "c", "none"))
    with pytest.raises(StudyError, match=r"but w is float32\[2\] in .*/a and float32\[3\] in .*/b: save both alike"):
        share_equal(a, b)
    with pytest.raises(StudyError, match=r"but only one of .*/a and .*/c has v: compare models of one arch"):
        share_equal(a, c)
    with pytest.raises(StudyError, match=r"but .*/none has none that can be read .*: save the model with"):
        share_equal(none, a)


def test_another_tokenizer_is_refused(copy: Path) -> None:
    other = train_tokenizer(["quite another text"], 280, 400)
    other.save_pretrained(copy / "order-1")
    with pytest.raises(StudyError) as caught:
        compare({"base": copy / "base", "odd": copy / "order-1"}, copy / "text")
    assert str(caught.value) == (
        f"loss per token is comparable over the same tokens only, but odd ({copy / 'order-1'}) splits the "
        f"text otherwise than base ({copy / 'base'}): compare models that share a tokenizer"
    )


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["base"], "a model is given as NAME=PATH, got 'base': write for example base=./models/base", 2),
        (["a=x", "a=y"], "a name stands for one model, got 'a' twice: rename one of them", 2),
        (
            ["base=missing"],
            "a model must be a folder with a Hugging Face checkpoint, but missing has no config.json: "
            "train or merge it first",
            1,
        ),
    ],
)
def test_compare_says_what_is_wrong_in_one_line(out: Path, arguments: list[str], message: str, code: int) -> None:
    result = CliRunner().invoke(main, ["compare", "--text", str(out / "text"), *arguments])
    assert result.exit_code == code
    assert result.output.splitlines()[-1] == f"Error: {message}"


def test_compare_without_a_text_says_how_to_get_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["compare", "--text", str(tmp_path), "base=x"])
    assert result.exit_code == 1
    assert result.output == (
        f"Error: the held_out part is read from disk, but {tmp_path / 'held_out.jsonl'} cannot be read (No "
        "such file or directory): train first, or name the folder with --text\n"
    )


def test_the_folder_runs_as_a_program(tmp_path: Path) -> None:
    # From another directory, and without its modules passing for top-level ones.
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "order_study"), "train", "--help"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Usage: order_study train [OPTIONS]" in done.stdout
    assert done.stderr == ""
