"""``verify`` says SAME only of a folder from which transformers, with peft installed, loads what the recipe gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_select.verification import verify
from tests.support.adapters import train_adapters
from tests.support.checkpoints import copied, edit_json
from tests.support.commands import invoke
from tests.support.models import small_family, write_tokenizer
from tests.support.recipes import merge, written
from tests.verification.support import problems

TOKENS = torch.tensor([[5, 9, 3, 17, 22, 8]])


def logits(folder: Path) -> torch.Tensor:
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def other_weights(out: Path, name: str) -> None:
    tensors = {key: tensor + 1 for key, tensor in load_file(out / "model.safetensors").items()}
    save_file(tensors, out / name, metadata={"format": "pt"})


def adapter(out: Path) -> None:
    (trained,) = train_adapters(out, out.parent, 1)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (out / file).write_bytes((trained / file).read_bytes())


def named_weights(out: Path) -> None:
    other_weights(out, "other.safetensors")
    edit_json(out / "config.json", transformers_weights="other.safetensors")


def named_weights_of_another_version(out: Path) -> None:
    named_weights(out)
    edit_json(out / "config.json", transformers_version="4.57.0")


def other_config(out: Path) -> None:
    content = json.loads((out / "config.json").read_text())
    (out / "config.4.0.0.json").write_text(json.dumps({**content, "rms_norm_eps": 1.0}))
    edit_json(out / "config.json", configuration_files=["config.4.0.0.json"], transformers_version="4.57.0")


def other_dtype(out: Path) -> None:
    edit_json(out / "config.json", dtype="float16")


def old_name_of_dtype(out: Path) -> None:
    content = json.loads((out / "config.json").read_text())
    del content["dtype"]
    (out / "config.json").write_text(json.dumps({**content, "torch_dtype": "float16"}))


WAYS: dict[Callable[[Path], None], str] = {
    adapter: "adapter_config.json",
    named_weights: "transformers_weights",
    named_weights_of_another_version: "transformers_weights",
    other_config: "configuration_files",
    other_dtype: "dtype",
    old_name_of_dtype: "dtype",
}


@pytest.mark.parametrize("change", WAYS, ids=lambda change: change.__name__)
def test_a_folder_that_loads_as_something_else(change: Callable[[Path], None], out: Path) -> None:
    before = logits(out)
    assert verify(out).same
    change(out)
    assert not torch.equal(before.double(), logits(out).double()), "the change must have an effect, or tests nothing"
    answer = verify(out)
    assert not answer.same
    assert any(WAYS[change] in place or WAYS[change] in text for _, place, text in problems(answer))
    assert invoke("verify", out).exit_code == 1


def test_a_shard_of_a_distributed_checkpoint_is_what_transformers_5_loads(out: Path) -> None:
    other_weights(out, "shard-00000-model-00001-of-00001.safetensors")
    assert not verify(out).same


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("auto_map", {"AutoModelForCausalLM": "evil/code--modeling.Model"}),
        ("custom_pipelines", {"text-generation": {"impl": "evil/code--pipeline.P"}}),
    ],
)
@pytest.mark.parametrize("version", [tf.__version__, "4.57.0"])
def test_a_key_that_transformers_obeys(out: Path, key: str, value: object, version: str) -> None:
    edit_json(out / "config.json", transformers_version=version, **{key: value})
    (problem,) = problems(verify(out))
    assert problem[:2] == ("inconsistent", "config.json")
    assert problem[2].startswith(f"{key} must not be set")


def test_code_may_be_named_in_the_repository_that_the_recipe_names(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    edit_json(family.base / "config.json", auto_map={"AutoModel": "modeling.M"})
    out = merge(family.recipe(), tmp_path / "out")
    assert verify(out).same
    edit_json(out / "config.json", auto_map={"AutoModel": f"{family.base}--modeling.M"})
    assert verify(out).same
    edit_json(out / "config.json", auto_map={"AutoModel": "evil/code--modeling.M"})
    assert not verify(out).same


OWN_CONFIG = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""


def test_code_that_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    family = small_family().copied(tmp_path / "models")
    for folder in family.everyone:
        edit_json(folder / "config.json", model_type="own_llama", auto_map={"AutoConfig": "own.OwnConfig"})
        (folder / "own.py").write_text(OWN_CONFIG)
    checked = invoke("check", written(tmp_path / "r.yml", family.recipe()), "--trust-remote-code")
    assert checked.exit_code == 0, checked.output
    out, trusting = (
        merge(family.recipe(), tmp_path / "out", trust_remote_code=True),
        MergeOptions(trust_remote_code=True),
    )
    assert (out / "own.py").read_text() == OWN_CONFIG  # transformers saves it with the config
    assert verify(out, options=trusting).same
    (out / "own.py").write_text(OWN_CONFIG + "import os")
    assert [problem[:2] for problem in problems(verify(out, options=trusting))] == [("inconsistent", "own.py")]


def test_code_that_is_named_in_a_list(tmp_path: Path) -> None:
    """Of a tokenizer's slow class and its fast one, either of which may be missing."""
    family = small_family().copied(tmp_path / "models")
    edit_json(family.base / "config.json", auto_map={"AutoTokenizer": ["own.Slow", None]})
    out = merge(family.recipe(), tmp_path / "out")
    for repository, same in ((str(family.base), True), ("evil/code", False)):
        edit_json(out / "config.json", auto_map={"AutoTokenizer": [f"{repository}--own.Slow", None]})
        assert verify(out).same == same


@pytest.mark.parametrize(
    "file",
    [
        "modeling_llama.py",
        "preprocessor_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "added_tokens.json",
        "tokenizer.4.0.0.json",
        "spiece.model",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "vocab.txt",
        "pytorch_model.fp16.bin",
    ],
)
def test_a_file_that_the_recipe_does_not_give(out: Path, file: str) -> None:
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("{}")
    assert [problem[:2] for problem in problems(verify(out))] == [("stale", file)]


@pytest.mark.parametrize("file", ["README.md", "LICENSE", "notes.txt", "plot.png", "merge_provenance.json"])
def test_a_file_that_is_never_loaded(out: Path, file: str) -> None:
    (out / file).write_text("x")
    assert verify(out).same


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_missing_cut_off_or_anothers(out: Path, file: str) -> None:
    whole = (out / file).read_bytes()
    (out / file).write_bytes(whole[: len(whole) // 2])
    assert [problem[:2] for problem in problems(verify(out))] == [("inconsistent", file)]
    (out / file).unlink()
    assert [problem[:2] for problem in problems(verify(out))] == [("unfinished", file)]
    assert verify(out, options=MergeOptions(copy_tokenizer=False)).same is False  # the other file is there
    write_tokenizer(out, 64, rotated=1)
    if file == "tokenizer.json":
        assert [problem[:2] for problem in problems(verify(out))] == [("inconsistent", file)]


def test_an_output_without_tokenizer_and_the_option_that_says_so(tmp_path: Path) -> None:
    out = merge(small_family().recipe(), tmp_path / "out", copy_tokenizer=False)
    assert {kind for kind, _, _ in problems(verify(out))} == {"unfinished"}
    assert verify(out, options=MergeOptions(copy_tokenizer=False)).same
    assert invoke("verify", out, "--no-copy-tokenizer").exit_code == 0


def test_models_without_tokenizer(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    for folder in family.everyone:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    out = merge(family.recipe(), tmp_path / "out")
    answer = verify(out)
    assert answer.same
    assert [note.kind for note in answer.notes] == ["tokenizer-missing"]


def test_generation_config_of_the_base_is_compared(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    (family.base / "generation_config.json").write_text('{"do_sample": true}')
    out = merge(family.recipe(), tmp_path / "out")
    assert verify(out).same
    (out / "generation_config.json").write_text('{"do_sample": false}')
    assert [problem[:2] for problem in problems(verify(out))] == [("inconsistent", "generation_config.json")]


@pytest.mark.parametrize("keys", [{}, {"chat_template": "chatml"}, {"tokenizer": {"source": "base"}}], ids=str)
def test_a_tokenizer_that_mergekit_writes_itself(keys: dict[str, Any], tmp_path: Path) -> None:
    out = merge(small_family().recipe(**keys), tmp_path / "out")
    assert verify(out).same
    content = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(content.replace('"t5": 5', '"t5": 6').replace('"t6": 6', '"t6": 5'))
    assert not verify(out).same
    (out / "tokenizer.json").write_text(content + "\n")
    assert verify(out).same == ("tokenizer" in keys)  # the same as loaded; a copy is the same in every byte


def test_a_tokenizer_of_any_model_without_a_base(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    for number, sub in enumerate(family.subs):
        write_tokenizer(sub, 64, rotated=number)
    recipe = family.recipe("linear", parameters={"weight": 1})
    del recipe["base_model"]
    out = merge(recipe, tmp_path / "out")
    assert verify(out).same
    for sub in family.subs:
        (out / "tokenizer.json").write_bytes((sub / "tokenizer.json").read_bytes())
        assert verify(out).same
    write_tokenizer(out, 64, rotated=7)
    assert not verify(out).same


def test_a_copy_keeps_all_it_should(out: Path, tmp_path: Path) -> None:
    assert verify(copied(out, tmp_path / "copy")).same
