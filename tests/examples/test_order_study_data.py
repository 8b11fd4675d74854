"""The order study's configuration and data: YAML, JSON lines, data sets, templates, parts, and samples as tokens."""

import json
import re
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as given_by_hypothesis
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from examples.order_study.config import load_study
from examples.order_study.data.order import OrderedBatches, batches, places
from examples.order_study.data.parts import Example, read_parts
from examples.order_study.data.records import expand, read_json_lines
from examples.order_study.data.samples import collator, encode, encode_part, prompt_ids
from examples.order_study.errors import StudyError
from examples.order_study.settings import FreshBase, GivenBase, Part, Study
from examples.order_study.sources import HubDataset, JsonLines, Text, TextFile
from examples.quickstart.train import train_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "order_study" / "configs"
PROMPT, RESPONSE = "Q: {question}\nA:", " {answer}"


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def questions(number: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(start, start + number)]


def given(data: JsonLines | HubDataset | Text) -> Study:
    """A study of a base that is never loaded here."""
    return Study(data=data, base=GivenBase(model="m"))


def pairs(train: Path, held_out: Path | None = None, **changes: Any) -> JsonLines:
    fields = dict(prompt=PROMPT, response=RESPONSE, held_out=held_out and str(held_out), **changes)
    return JsonLines(source="jsonl", train=str(train), **fields)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "train.jsonl", questions(20))


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "test.jsonl", questions(5, start=100))


# Configuration


def config(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["quick", "gsm8k-small", "llama"])
def test_shipped_configurations_are_valid(name: str) -> None:
    assert len(load_study(CONFIGS / f"{name}.yaml").orders) >= 3


def test_an_empty_mapping_is_the_study_of_the_makefile(tmp_path: Path) -> None:
    assert load_study(config(tmp_path, "{}")) == Study()


def test_a_written_study_reads_back(tmp_path: Path) -> None:
    study = load_study(CONFIGS / "gsm8k-small.yaml")
    assert load_study(config(tmp_path, study.model_dump_json())) == study


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("order: [1, 2]", "order is no setting: did you mean orders?"),
        ("fine_tuning: {epochs: 3, learning_rat: 1}", "fine_tuning.learning_rate is missing: add it"),
        ("fine_tuning: {epochs: 3, learning_rat: 1}", "fine_tuning.learning_rat is no setting: did you mean"),
        ("base: {architecture: {hidden: 3}}", "base.architecture.hidden is no setting: did you mean hidden_size?"),
        ("base: {model: m, revison: r}", "base.revison is no setting: did you mean revision?"),
        ("data: {source: jsonl, zzz: 1}", "data.zzz is no setting: known here: prompt, response, skip"),
        ("data: {train: x}", "data.source must say where the data come from: pydoc_data.topics, jsonl, datasets"),
        ("data: {source: csv}", "data.source must say where the data come from: pydoc_data.topics, jsonl, datasets"),
        ("orders: []", "orders: orders must be one or more different seeds, got (): list each seed once"),
        ("orders: [1, 2, 1]", "orders: orders must be one or more different seeds, got (1, 2, 1)"),
        ("orders: [1, -2]", "orders.1: input should be greater than or equal to 0, got -2: change it"),
        ("composition: random", "composition: input should be 'redrawn' or 'fixed', got 'random': change it"),
        ("merging: {seeds: []}", "merging: seeds must be one or more different seeds, got ()"),
        ("merging: {rounds: [1, 1]}", "merging: rounds must be different, got (1, 1)"),
        (
            "fine_tuning: {epochs: 1, learning_rate: 1.0e-3, batch_size: 8, gradient_accumulation: 3}",
            "batch_size must be a multiple of gradient_accumulation, got 8 and 3",
        ),
        (
            "base: {training: {epochs: 1, learning_rate: 0.1, lora: {}}}",
            "base.training: a fresh base has no weights yet that an adapter could add to: leave lora out",
        ),
        ("fine_tuning: {epochs: 1, learning_rate: 1.0e-3, saved_as: fp32}", "must be saved in one dtype"),
        (
            "data: {source: jsonl, train: a, held_out: b, prompt: '{q}', response: '{a}'}",
            "a base is trained from fresh weights on text of its own, but base.text is missing",
        ),
        (
            "data: {source: jsonl, train: a, prompt: '{q}', response: '{a}'}",
            "data: what is held out is named by held_out or drawn as held_out_share, got neither: give one of them",
        ),
        (
            "data: {source: datasets, id: a, held_out_split: b, held_out_share: 0.5, prompt: '{q}', response: '{a}'}",
            "data: what is held out is named by held_out_split or drawn as held_out_share, got both: give one of them",
        ),
        (
            "data: {source: jsonl, train: a, take: 4, held_out: b, validation: a, validation_skip: 3, "
            "prompt: '{q}', response: '{a}'}",
            "data: no record may serve both training and validation, but both take record 3 of a (counted from 0, once",
        ),
        (
            "data: {source: jsonl, train: a, held_out: b, validation: b, held_out_take: 9, "
            "prompt: '{q}', response: '{a}'}",
            "data: no record may serve both what is held out and validation, but both take record 0 of b",
        ),
        (
            "data: {source: datasets, id: a, held_out_split: train, prompt: '{q}', response: '{a}'}",
            "data: no record may serve both training and what is held out, but both take record 0 of train",
        ),
        (
            "data: {source: jsonl, train: a, held_out: b, prompt: '{q', response: '{a}'}",
            "data.prompt: a template must be text with fields in braces, but '{q' cannot be read (",
        ),
        (
            "data: {source: jsonl, train: a, held_out: b, prompt: '{q}', response: answer}",
            "data.response: a template must name a field of the data, got 'answer': write for example {question}",
        ),
        (
            "data: {source: jsonl, train: a, held_out: b, prompt: '{q.__class__}', response: '{a}'}",
            "data.prompt: a template names fields of the data, but '{q.__class__}' has {q.__class__}: put the name",
        ),
        (
            "controls: [tise]",
            "controls.0: a control must be ties, dare_ties, longer, ",
        ),
        ("{orders: [1], controls: [ties]}", "need two or more orders, got ['ties'] for orders [1]: list"),
        ("- 1", "a study is a mapping of settings, but "),
        ("", "a study is a mapping of settings, but "),
        ("a: [", "is not YAML ("),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = config(tmp_path, content)
    with pytest.raises(StudyError) as caught:
        load_study(path)
    lines = [line for line in str(caught.value).splitlines() if message in line]
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert "pydantic" not in str(caught.value)


def test_every_problem_of_a_configuration_has_a_line(tmp_path: Path) -> None:
    path = config(tmp_path, "orders: [1, 1]\nthread: 2\nfine_tuning: {epochs: 0}")
    with pytest.raises(StudyError) as caught:
        load_study(path)
    places = [line.removeprefix(f"{path}: ").split()[0].rstrip(":") for line in str(caught.value).splitlines()]
    assert sorted(places) == ["fine_tuning.epochs", "fine_tuning.learning_rate", "orders", "thread"]


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"but .*none\.yaml cannot be read \(No such file or directory\): check"):
        load_study(tmp_path / "none.yaml")


def test_errors_of_a_configuration_come_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, examples.order_study.cli as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    root = CONFIGS.parents[2]
    path = config(tmp_path, "orders: []")
    done = subprocess.run([sys.executable, "-c", program, path], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert done.stderr.startswith(f"Error: {path}: orders: orders must be one or more different seeds")


# Records and parts


def test_records_become_prompt_and_response(tmp_path: Path, train: Path, held_out: Path) -> None:
    parts = read_parts(given(pairs(train, held_out, skip=2, take=3, held_out_take=1)))
    assert list(parts) == ["fine_tuning", "held_out"]
    assert parts["fine_tuning"] == [Example(f"Q: {i} + 1?\nA:", f" {i + 1}") for i in (2, 3, 4)]
    assert parts["held_out"] == [Example("Q: 100 + 1?\nA:", " 101")]


def test_validation_may_be_of_the_training_records_that_are_not_taken(train: Path, held_out: Path) -> None:
    chosen = {"shuffle": 3, "take": 12, "validation": str(train), "validation_skip": 12, "validation_take": 5}
    parts = read_parts(given(pairs(train, held_out, **chosen)))
    assert (len(parts["fine_tuning"]), len(parts["validation"])) == (12, 5)
    assert not set(parts["fine_tuning"]) & set(parts["validation"])
    everything = read_parts(given(pairs(train, held_out, shuffle=3)))["fine_tuning"]
    assert [*parts["fine_tuning"], *parts["validation"]] == everything[:17]


def test_a_share_is_held_out_by_content(tmp_path: Path) -> None:
    records = questions(400)
    train = write_lines(tmp_path / "a.jsonl", records)
    parts = read_parts(given(pairs(train, held_out_share=0.25)))
    aside, kept = set(parts["held_out"]), set(parts["fine_tuning"])
    assert not aside & kept
    assert len(aside) + len(kept) == 400
    assert 60 < len(aside) < 140
    # A record that is added, even as a copy, moves no other.
    longer = write_lines(tmp_path / "b.jsonl", [*questions(5, start=1000), *records, *records[:50]])
    again = read_parts(given(pairs(longer, held_out_share=0.25)))
    assert aside <= set(again["held_out"])
    assert kept <= set(again["fine_tuning"])
    assert not set(again["held_out"]) & set(again["fine_tuning"])


def test_numbers_and_lists_are_put_in_as_json(tmp_path: Path, held_out: Path) -> None:
    train = write_lines(tmp_path / "numbers.jsonl", [{"question": [1, "ü"], "answer": 0}])
    parts = read_parts(given(pairs(train, held_out)))
    assert parts["fine_tuning"] == [Example('Q: [1, "ü"]\nA:', " 0")]


def test_a_base_is_trained_on_files_of_its_own(tmp_path: Path, train: Path, held_out: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("one\n\ntwo\n\nthree and four\n", encoding="utf-8")
    files = (
        TextFile(path=str(train), template="{question} {answer}", skip=18),
        TextFile(path=str(plain), passage_characters=10),
    )
    parts = read_parts(Study(data=pairs(train, held_out), base=FreshBase(text=files)))
    expected = ["18 + 1? 19", "19 + 1? 20", "one\n\ntwo", "three and ", "four"]
    assert [example.response for example in parts["base"]] == expected
    assert all(example.prompt == "" for example in parts["base"])


def test_paths_may_name_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDY_DATA", "/data")
    assert expand("${STUDY_DATA}/a.jsonl") == Path("/data/a.jsonl")
    monkeypatch.delenv("STUDY_DATA")
    with pytest.raises(StudyError) as caught:
        expand("${STUDY_DATA}/a.jsonl")
    assert str(caught.value) == (
        "a path may name environment variables that are set, but STUDY_DATA in '${STUDY_DATA}/a.jsonl' is not: "
        "set it, for example with export STUDY_DATA=/path/to/data"
    )


def test_empty_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"a": "\xe2\x80\xa8"}\r\n\n{"a": 2}')
    assert list(read_json_lines(path)) == [(f"line 2 of {path}", {"a": "\u2028"}), (f"line 4 of {path}", {"a": 2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "q"}', "but line 1 of {path} has no 'answer' (fields there: 'question'): change the template"),
        (b'{"question": "q", "answer": null}', "but line 1 of {path} has no 'answer' (fields there: 'question')"),
        (b"{}", "but line 1 of {path} has no 'question' (fields there: none)"),
        (
            b'{"question": "q", "answer": "a"}\n{"question": "q", "answer": " "}',
            "a response must not be empty, as there is nothing to learn from it, but line 2 of {path} gives '  '",
        ),
        (
            b'{"question": "q", ',
            'each line must be a JSON object, but line 1 of {path} is \'{{"question": "q", \', and it is not JSON',
        ),
        (
            b'["q"]',
            "line 1 of {path} is '[\"q\"]', and it has no named fields: mend",
        ),
        (b"\xff", "the data must be text in UTF-8, but {path} has b'\\xff' at byte 0: convert the file"),
        (b"", "{path} must have as many as are taken, but take all after skip 0 asks for more than the 0 there are"),
    ],
)
def test_faulty_records_are_named(tmp_path: Path, held_out: Path, content: bytes, message: str) -> None:
    path = tmp_path / "faulty.jsonl"
    path.write_bytes(content)
    with pytest.raises(StudyError) as caught:
        read_parts(given(pairs(path, held_out)))
    assert message.format(path=path) in str(caught.value).replace("{}", "")


def test_more_records_than_there_are_cannot_be_taken(tmp_path: Path, train: Path, held_out: Path) -> None:
    with pytest.raises(StudyError, match=r"take 15 after skip 6 asks for more than the 20 there are: lower one"):
        read_parts(given(pairs(train, held_out, skip=6, take=15)))
    with pytest.raises(StudyError, match=r"what is held out must have as many .* take 6 after skip 0 .* the 5 there"):
        read_parts(given(pairs(train, held_out, held_out_take=6)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path, train: Path) -> None:
    with pytest.raises(StudyError, match=r"but .*none\.jsonl cannot be read \(No such file or directory\): check"):
        read_parts(given(pairs(train, tmp_path / "none.jsonl")))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the package `datasets`, and what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, revision: str | None, split: str) -> list[dict[str, str]]:
        asked.append((*arguments, revision, split))
        if split == "none":
            raise ValueError("unknown split")
        return questions(4 if split == "train" else 2)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_of_the_hub_is_read_by_its_splits(tmp_path: Path, hub: list[tuple[Any, ...]]) -> None:
    source = HubDataset(
        source="datasets", id="some/set", name="main", held_out_split="test", prompt=PROMPT, response=RESPONSE
    )
    parts = read_parts(given(source))
    assert sorted(hub) == [("some/set", "main", None, "test"), ("some/set", "main", None, "train")]
    assert (len(parts["fine_tuning"]), len(parts["held_out"])) == (4, 2)
    missing = source.model_copy(update={"held_out_split": "none"})
    with pytest.raises(StudyError, match=r"split 'none' of some/set \(name 'main'\) is not \(ValueError: unknown"):
        read_parts(given(missing))
    misnamed = source.model_copy(update={"response": "{reply}"})
    with pytest.raises(StudyError, match=r"row 0 of some/set, split train has no 'reply'"):
        read_parts(given(misnamed))


def test_a_folder_of_json_lines_is_a_data_set_too(tmp_path: Path, train: Path) -> None:
    """The package itself, without the hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(train.read_bytes())
    source = HubDataset(source="datasets", id=str(folder), held_out_share=0.5, prompt=PROMPT, response=RESPONSE)
    parts = read_parts(given(source))
    assert len(parts["fine_tuning"]) + len(parts["held_out"]) == 20


def test_without_the_package_datasets_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = HubDataset(source="datasets", id="x", held_out_split="test", prompt=PROMPT, response=RESPONSE)
    with pytest.raises(StudyError, match=r"pip install '\.\[study\]', or name JSON lines by path"):
        read_parts(given(source))


# Tokens


def test_loss_is_on_the_response_and_its_end_alone() -> None:
    tokenizer = train_tokenizer(["some words to learn tokens from " * 3], 300, 100)
    (sample,) = encode_part("held_out", [Example("Q: words?\nA:", " tokens")], tokenizer, 100).samples
    begin = tokenizer("Q: words?\nA:")["input_ids"]
    end = [*tokenizer(" tokens", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert begin[0] == tokenizer.bos_token_id
    assert sample == {"input_ids": begin + end, "labels": [-100] * len(begin) + end}


def test_without_a_prompt_the_start_token_alone_has_no_loss() -> None:
    tokenizer = train_tokenizer(["some words"], 300, 100)
    (sample,) = encode_part("held_out", [Example("", "some words")], tokenizer, 100).samples
    assert sample["input_ids"] == [*tokenizer("some words")["input_ids"], tokenizer.eos_token_id]
    assert sample["labels"] == [-100, *sample["input_ids"][1:]]


def words(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["a", "b", "<end>", "<none>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<none>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = wrapped(
        tokenizer_object=tokenizer, eos_token="<end>", padding_side="left", **special
    )
    return made


def test_without_a_token_for_padding_batches_are_padded_with_the_end_token() -> None:
    tokenizer = words()
    samples = encode_part("held_out", [Example("a", "b"), Example("", "a b a b")], tokenizer, 10).samples
    batch = collator(tokenizer)(samples)
    assert tokenizer.pad_token is None
    assert batch["input_ids"].tolist() == [[2, 2, 0, 1, 2], [0, 1, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 1, 2], [0, 1, 0, 1, 2]]


def test_an_end_token_that_a_tokenizer_adds_is_not_part_of_the_prompt() -> None:
    tokenizer = words(bos_token="<none>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<none> $A <end>", special_tokens=[("<none>", 3), ("<end>", 2)]
    )
    assert tokenizer("a b")["input_ids"] == [3, 0, 1, 2]
    assert prompt_ids("a b", tokenizer) == [3, 0, 1]


# Order


@given_by_hypothesis(st.integers(1, 120), st.integers(0, 5), st.integers(0, 3), st.sampled_from(["redrawn", "fixed"]))
@settings(max_examples=30, deadline=None)
def test_each_sample_has_one_place_in_an_epoch(samples: int, seed: int, epoch: int, composition: Any) -> None:
    cut = batches(samples, seed, epoch, 8, composition)
    assert sorted(index for batch in cut for index in batch) == list(range(samples))
    assert sorted(map(len, cut))[1:] == [8] * ((samples - 1) // 8)
    where = places(samples, seed, epoch, 8, composition)
    assert all(where[index] == number for number, batch in enumerate(cut) for index in batch)


def test_fixed_composition_permutes_the_same_batches() -> None:
    orders = {tuple(map(tuple, batches(100, seed, epoch, 8, "fixed"))) for seed in (1, 2, 3) for epoch in range(3)}
    assert len(orders) == 9
    assert len({frozenset(order) for order in orders}) == 1
    short = {[len(batch) for batch in batches(100, seed, 0, 8, "fixed")].index(4) for seed in range(20)}
    assert len(short) > 5  # the short batch is one of them, wherever it falls


@pytest.mark.parametrize(("samples", "composition"), [(20, "redrawn"), (20, "fixed"), (17, "redrawn"), (16, "fixed")])
def test_pieces_to_accumulate_over_make_up_the_batches(samples: int, composition: Any) -> None:
    pieces = OrderedBatches(samples, 1, 8, composition, pieces=4)
    listed = list(pieces)
    assert len(listed) == len(pieces)
    assert [i for piece in listed for i in piece] == [i for b in batches(samples, 1, 0, 8, composition) for i in b]
    assert max(map(len, listed)) == 2


def test_a_short_fixed_batch_that_cannot_be_cut_into_pieces_is_refused() -> None:
    with pytest.raises(StudyError, match=re.escape("must give 4 pieces to accumulate gradients over, but the last")):
        OrderedBatches(17, 1, 8, "fixed", pieces=4)


# Chat, and a limit


def test_a_chat_template_frames_the_prompt(tmp_path: Path, train: Path, held_out: Path) -> None:
    tokenizer = train_tokenizer(["some words"], 300, 100)
    data = pairs(train, held_out, chat_template=True)
    with pytest.raises(StudyError, match=r"data\.chat_template must be that of the base's tokenizer, but this"):
        encode(read_parts(given(data)), data, tokenizer, 100)
    tokenizer.chat_template = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}{% endfor %} [model]"
    made = encode(read_parts(given(data)), data, tokenizer, 100)["held_out"].samples[0]
    response = [label for label in made["labels"] if label != -100]
    assert tokenizer.decode(made["input_ids"]) == "<s>[user] Q: 100 + 1?\nA: [model] 101</s>"
    assert tokenizer.decode(response) == " 101</s>"


def test_samples_beyond_the_limit_are_left_out_and_counted(train: Path, held_out: Path) -> None:
    tokenizer = train_tokenizer(["x"], 300, 100)
    parts: dict[Part, Sequence[Example]] = {"fine_tuning": read_parts(given(pairs(train, held_out)))["fine_tuning"]}
    lengths = [len(one["input_ids"]) for one in encode(parts, Text(), tokenizer, 100)["fine_tuning"].samples]
    data = pairs(train, held_out, max_tokens=sorted(lengths)[10] - 1)
    made = encode(parts, data, tokenizer, 100)["fine_tuning"]
    assert [len(one["input_ids"]) for one in made.samples] == [n for n in lengths if n < sorted(lengths)[10]]
    assert 0 < made.left_out == 20 - len(made.samples) == 20 - len(made.responses)
