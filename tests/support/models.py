"""Families of random models that take a moment to make: a base, and sub-models that moved some of its parameters."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.support.checkpoints import copied
from tests.support.recipes import RESAMPLING, Recipe, recipe

SUB_MODELS = ("a", "b", "c")
VOCABULARY_SIZE = 96


@dataclass(frozen=True)
class Family:
    """A folder that holds a base model and its sub-models."""

    root: Path

    @property
    def base(self) -> Path:
        """The base model's folder."""
        return self.root / "base"

    @property
    def subs(self) -> list[Path]:
        """The sub-models' folders."""
        return [self.root / name for name in SUB_MODELS]

    @property
    def everyone(self) -> list[Path]:
        """All folders, the base's first."""
        return [self.base, *self.subs]

    def recipe(self, method: str = RESAMPLING, **keys: Any) -> Recipe:
        """A recipe of all of them."""
        return recipe(method, self.base, self.subs, **keys)

    def copied(self, to: Path) -> Family:
        """A copy that a test may change."""
        return Family(copied(self.root, to))


def write_family(root: Path, model: Any, dtype: torch.dtype = torch.bfloat16, spread: float = 0.1) -> Family:
    """Save a model of transformers as the base, and sub-models of it.

    A fifth of the parameters stay as the base has them in every sub-model, and some more in each; the others move by a
    normal step.
    """
    family = Family(root)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        model.to(dtype)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        shared = {name: torch.rand(value.shape) < 0.2 for name, value in before.items()}
        model.save_pretrained(family.base)
        for number, folder in enumerate(family.subs, 1):
            for name, parameter in model.named_parameters():
                stays = shared[name] | (torch.rand(parameter.shape) < 0.15 * number)
                moved = before[name].double() + spread * torch.randn(parameter.shape, dtype=torch.float64)
                parameter.copy_(torch.where(stays, before[name], moved.to(dtype)))
            model.save_pretrained(folder)
    for folder in family.everyone:
        assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]
    return family


def assert_loads(folder: Path, model: Any = tf.LlamaForCausalLM) -> None:
    """Assert that transformers loads a checkpoint with no tensor missing and none left over."""
    _, report = model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report


def write_llamas(
    root: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    layers: int = 3,
    vocabulary: int = VOCABULARY_SIZE,
    tied: bool = False,
    rotated: bool = False,
) -> Family:
    """Save a family of Llamas with tokenizers; `rotated` gives every sub-model another order of the same tokens."""
    config = tf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(config)
    family = write_family(root, model, dtype)
    for number, folder in enumerate(family.everyone):
        write_tokenizer(folder, vocabulary, number if rotated else 0)
    return family


def write_tokenizer(folder: Path, size: int = VOCABULARY_SIZE, rotated: int = 0) -> None:
    """Save a tokenizer of the words t0, t1, … and <unk>, which comes last."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"t{(k + rotated) % (size - 1)}": k for k in range(size - 1)} | {"<unk>": size - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    wrapped: Any = tf.PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="small-models-")


@functools.cache
def small_family(
    dtype: torch.dtype = torch.bfloat16, tied: bool = False, rotated: bool = False, layers: int = 2
) -> Family:
    """A family of Llamas for the whole session, which no test may change."""
    root = Path(tempfile.mkdtemp(dir=_folder().name))
    return write_llamas(root, dtype=dtype, layers=layers, vocabulary=64, tied=tied, rotated=rotated)
