"""``verify`` says which weights, indexes and companions do not agree, and in what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_select.bits import digest
from mergekit_select.verification import verify
from mergekit_select.verification.companions import companion_problems
from mergekit_select.verification.comparison import Compared, compared
from mergekit_select.verification.output import open_output
from tests.support.checkpoints import edit_json, tensors_of, weight_map
from tests.support.commands import invoke
from tests.support.models import small_family, write_tokenizer
from tests.support.recipes import merge
from tests.verification.support import kinds, problems, refused

INDEX = "model.safetensors.index.json"
CODE = """
import pathlib
from transformers import PreTrainedTokenizerFast
pathlib.Path({!r}).write_text("ran")
class Own(PreTrainedTokenizerFast): ...
"""


def shard(number: int) -> str:
    return f"model-{number:05d}-of-00007.safetensors"


def put(folder: Path, file: str, name: str) -> None:
    """Put a tensor of two bytes into a shard."""
    tensors = load_file(folder / file)
    save_file({**tensors, name: torch.ones(1, dtype=torch.bfloat16)}, folder / file, metadata={"format": "pt"})


def test_a_tensor_that_two_shards_hold(shards: Path) -> None:
    name = next(iter(load_file(shards / shard(2))))
    put(shards, shard(5), name)
    texts = [(place, text) for _, place, text in problems(verify(shards))]
    assert (shard(5), f"holds {name!r}, as {shard(2)} does") in texts


def test_index_and_shards_that_name_different_tensors(shards: Path) -> None:
    put(shards, shard(3), "unnamed")
    with weight_map(shards) as files:
        files["nowhere"] = shard(5)
        moved = next(name for name, file in files.items() if file == shard(4))
        files[moved] = shard(2)
    assert [(place, text) for _, place, text in problems(verify(shards))] == [
        (INDEX, f"says that {shard(2)} holds {moved!r}, which is in {shard(4)}"),
        (INDEX, f"says that {shard(5)} holds 'nowhere', which it does not hold"),
        (INDEX, f"does not name 'unnamed', which {shard(3)} holds"),
        (INDEX, "metadata.total_size must be the 39234 bytes of the tensors, got 39232"),
    ]


def test_an_extra_tensor_counts_towards_the_total_size(shards: Path) -> None:
    put(shards, shard(3), "more")
    with weight_map(shards) as files:
        files["more"] = shard(3)
    edit_json(shards / INDEX, metadata={"total_size": 39_234})
    answer = verify(shards)
    assert answer.problems == ()
    assert kinds(answer) == {"extra"}


@pytest.mark.parametrize("metadata", [{}, {"total_size": None}], ids=str)
def test_an_index_that_states_no_size(shards: Path, metadata: dict[str, None]) -> None:
    """transformers does not read it."""
    edit_json(shards / INDEX, metadata=metadata)
    assert verify(shards).same


def test_pickled_shards_without_their_index(tmp_path: Path) -> None:
    out = merge(small_family().recipe(), tmp_path / "out", safe_serialization=False, out_shard_size=8_000)
    (out / "pytorch_model.bin.index.json").unlink()
    (problem,) = problems(verify(out))
    assert problem == (
        "unfinished",
        "pytorch_model.bin.index.json",
        "missing: mergekit writes it after all shards; merge again",
    )


def test_a_single_shard_without_its_index(shards: Path) -> None:
    for number in range(2, 8):
        (shards / shard(number)).unlink()
    (shards / INDEX).unlink()
    assert problems(verify(shards))[0][:2] == ("unfinished", INDEX)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(out: Path) -> None:
    os.mkfifo(out / "notes.txt")
    refused(invoke("verify", out), "notes.txt must be a regular file, and is a pipe")


def test_a_tensor_that_the_output_lacks_counts_for_nothing(out: Path) -> None:
    expected = torch.ones(2)
    result = compared(open_output(out), "nowhere", expected)
    assert result == Compared(elements=0, nbytes=0, missing=("float32 [2]", digest(expected)))


def test_what_a_missing_or_forgotten_shard_is_named_by(shards: Path) -> None:
    (shards / shard(2)).unlink()
    with weight_map(shards) as files:
        for name in [name for name, file in files.items() if file == shard(3)]:
            del files[name]
    texts = {place: text for _, place, text in problems(verify(shards))}
    assert texts[shard(2)].startswith(f"missing: {INDEX} names this shard")
    assert texts[shard(3)].startswith(f"{INDEX} names no tensor of this shard, which is of the same merge")


def test_a_shard_without_its_number_of_shards_is_of_an_interrupted_merge(out: Path) -> None:
    for name in ("model-3.safetensors", "pytorch_model.bin"):
        save_file({}, out / name, metadata={"format": "pt"})
    assert problems(verify(out)) == [
        ("unfinished", "model-3.safetensors", "left by a merge that was interrupted; merge again into an empty folder"),
        (
            "stale",
            "pytorch_model.bin",
            "of another merge into this folder; transformers loads model.safetensors; delete the older",
        ),
    ]


def test_weights_without_the_metadata_that_transformers_asks_for(out: Path) -> None:
    save_file(tensors_of(out), out / "model.safetensors")
    assert problems(verify(out)) == [
        (
            "inconsistent",
            "model.safetensors",
            "its metadata must be {'format': 'pt'}, as mergekit writes it, got None",
        )
    ]


def test_a_pickle_that_holds_no_dictionary(tmp_path: Path) -> None:
    out = merge(small_family().recipe(), tmp_path / "out", safe_serialization=False)
    torch.save([torch.zeros(2)], out / "pytorch_model.bin")
    refused(invoke("verify", out), "pytorch_model.bin must hold a dictionary of tensors, it holds a list")


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    out = merge(small_family().recipe(), tmp_path / "out", safe_serialization=False)
    torch.save({"model.norm.weight": Malicious(tmp_path / "ran")}, out / "pytorch_model.bin")
    refused(invoke("verify", out), "cannot read")
    assert not (tmp_path / "ran").exists()


def test_where_a_companion_differs(out: Path) -> None:
    file = out / "tokenizer_config.json"
    whole = file.read_bytes()
    file.write_bytes(whole[:5] + b"\0" + whole[6:])
    text = "it is not the file that the recipe gives: {}; merge again, or restore it"
    assert problems(verify(out)) == [("inconsistent", file.name, text.format("byte 5 differs"))]
    file.write_bytes(whole + b"\n")
    lengths = f"{len(whole) + 1} bytes instead of {len(whole)}"
    assert problems(verify(out)) == [("inconsistent", file.name, text.format(lengths))]


@pytest.mark.parametrize("file", ["adapter_config.json", "chat_template.jinja"])
def test_an_adapter_is_told_from_other_files(out: Path, file: str) -> None:
    (out / file).write_text("{}")
    (problem,) = problems(verify(out))
    assert problem[:2] == ("stale", file)
    assert ("peft is installed" in problem[2]) == (file == "adapter_config.json")


def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path) -> None:
    for name in ("expected", "found"):
        write_tokenizer(tmp_path / name, 64)
    (tmp_path / "found" / "tokenizer.json").write_text("{")
    (problem,) = companion_problems(tmp_path / "found", tmp_path / "expected", aligned=True, reordered=False)
    assert problem.place == "tokenizer.json"
    assert "transformers cannot load the tokenizer: " in problem.text


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for name in ("expected", "found"):
        write_tokenizer(tmp_path / name, 64)
        (tmp_path / name / "own.py").write_text(CODE.format(str(ran)))
        auto_map = {"AutoTokenizer": [None, "own.Own"]}
        edit_json(tmp_path / name / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)
    tokenizer = tmp_path / "found" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    companion_problems(tmp_path / "found", tmp_path / "expected", aligned=True, reordered=False)
    assert not ran.exists()
