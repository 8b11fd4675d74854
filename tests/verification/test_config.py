"""``verify`` compares the output's config.json with the one that the recipe gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from mergekit_select.verification import verify
from mergekit_select.verification.config import config_problems
from tests.support.checkpoints import edit_json
from tests.support.commands import invoke
from tests.support.models import small_family, write_family
from tests.support.recipes import merge
from tests.verification.support import kinds, problems


def edit_config(folder: Path, keys: dict[str, Any]) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **keys}
    deleted = {key for key, value in keys.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in deleted}))


def test_config_of_another_model(out: Path) -> None:
    edit_json(out / "config.json", num_hidden_layers=3)
    (problem,) = verify(out).problems
    assert problem.text == "num_hidden_layers must be 2, as the recipe gives it, got 3"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"vocab_size": 63}, "vocab_size must be 64, as the recipe gives it, got 63"),
        ({"head_dim": 4}, "head_dim must be 8, as the recipe gives it, got 4"),
        ({"attention_bias": True}, "attention_bias must be False, as the recipe gives it, got True"),
        ({"dtype": "float16"}, "dtype must be 'bfloat16', as the recipe gives it, got 'float16'"),
        ({"hidden_size": None}, "hidden_size must be 32, as the recipe gives it, it is missing"),
        (
            {"architectures": None},
            "architectures must be ['LlamaForCausalLM'], as the recipe gives it, it is missing",
        ),
        ({"model_type": "mistral"}, "model_type must be 'llama', as the recipe gives it, got 'mistral'"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder must not be set, as the recipe gives none, got True"),
    ],
    ids=str,
)
def test_damaged_config(out: Path, keys: dict[str, Any], text: str) -> None:
    """None deletes a key."""
    edit_config(out, keys)
    assert problems(verify(out)) == [("inconsistent", "config.json", text)]
    assert invoke("verify", out).exit_code == 1
    edit_config(out, {"transformers_version": "4.50.0"})
    assert kinds(verify(out)) == {"inconsistent"}


@pytest.mark.parametrize(
    "keys",
    [
        {"_name_or_path": "x", "use_cache": False, "torch_dtype": "bfloat16", "dtype": None},
        {"is_encoder_decoder": False},
        {"torch_dtype": "float16"},  # beside dtype, which transformers lets win
        {"transformers_version": "4.46.0", "pruned_heads": {}, "auto_map": {}},
        # As transformers 4 wrote it.
        {
            "transformers_version": "4.46.0",
            "dtype": None,
            "torch_dtype": "bfloat16",
            "head_dim": None,
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "pretraining_tp": 1,
        },
    ],
    ids=str,
)
def test_config_that_says_the_same_otherwise(out: Path, keys: dict[str, Any]) -> None:
    edit_config(out, keys)
    assert verify(out).problems == ()


def test_what_follows_an_empty_key_is_compared_too(out: Path) -> None:
    edit_json(out / "config.json", transformers_version="4.46.0", auto_map={}, pruned_heads={}, vocab_size=63)
    (problem,) = verify(out).problems
    assert problem.text == "vocab_size must be 64, as the recipe gives it, got 63"


def test_config_that_transformers_cannot_read(out: Path) -> None:
    edit_config(out, {"use_cache": [True]})
    (problem,) = verify(out).problems
    assert problem.text.startswith("transformers cannot read it: ")


def test_config_of_any_model_without_a_base(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    for number, sub in enumerate(family.subs):
        edit_json(sub / "config.json", max_position_embeddings=32 << number)
    recipe = family.recipe("linear", parameters={"weight": 1})
    del recipe["base_model"]
    out = merge(recipe, tmp_path / "out")
    assert verify(out).same
    for number in range(3):
        edit_json(out / "config.json", max_position_embeddings=32 << number)
        assert verify(out).same
    edit_json(out / "config.json", vocab_size=63)
    (problem,) = verify(out).problems
    assert problem.text == "vocab_size must be 64, as the recipe gives it, got 63"


def test_size_of_an_aligned_vocabulary(tmp_path: Path) -> None:
    family = small_family(rotated=True)
    recipe = family.recipe(tokenizer={"source": "base", "pad_to_multiple_of": 48})
    out = merge(recipe, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 96
    assert verify(out).same
    edit_json(out / "config.json", vocab_size=64)
    (problem,) = verify(out).problems
    assert problem.text == "vocab_size must be 96, as the recipe gives it, got 64"


def test_config_of_another_architecture(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=64)
    family = write_family(tmp_path / "models", transformers.GPT2LMHeadModel(config))
    out = merge(family.recipe(), tmp_path / "out")
    assert verify(out).same
    edit_json(out / "config.json", n_embd=32, n_layer=None)
    assert [problem.text for problem in verify(out).problems] == [
        "n_embd must be 16, as the recipe gives it, got 32",
        "n_layer must be 1, as the recipe gives it, got None",
    ]


@pytest.mark.parametrize(
    ("version", "model", "tokenizer", "patched"),
    [
        ("4.57.1", "mistral", {"fix_mistral_regex": True}, True),
        ("x", "mistral", {"fix_mistral_regex": True}, True),
        (None, "mistral", {"fix_mistral_regex": True}, True),
        ("5.0.0", "mistral", {"fix_mistral_regex": True}, False),
        ("4.57.1", "mistral", {"fix_mistral_regex": False}, False),
        ("4.57.1", "mistral", {}, False),
        ("4.57.1", "mistral", None, False),
        ("4.57.1", "llama", {"fix_mistral_regex": True}, False),
    ],
    ids=str,
)
def test_the_version_by_which_transformers_patches_a_tokenizer(
    version: str | None, model: str, tokenizer: dict[str, Any] | None, patched: bool, tmp_path: Path
) -> None:
    expected = transformers.CONFIG_MAPPING[model]()
    path = tmp_path / "config.json"
    expected.to_json_file(path)
    edit_config(tmp_path, {"transformers_version": version})
    if tokenizer is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    texts = [problem.text for problem in config_problems(path, expected, ())]
    got = "it is missing" if version is None else f"got {version!r}"
    ours = f"transformers_version must be {transformers.__version__!r}, as the recipe gives it, {got}"
    assert texts == [ours] * patched
