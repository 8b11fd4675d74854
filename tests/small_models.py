"""Checkpoints small enough to be built for every test session, and merges of them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

SUB_MODELS = 3
TOKENS = 64


@functools.lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="small-models-")


@functools.lru_cache(maxsize=8)
def family(dtype: torch.dtype = torch.bfloat16, tied: bool = False, tokenizer: bool = False, layers: int = 2) -> Path:
    """Return a folder with a base model and sub-models a, b, c.

    Each sub-model leaves a part of the parameters as the base has them, some of them the same part.
    """
    root = Path(tempfile.mkdtemp(dir=_folder().name))
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=TOKENS,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).to(dtype).state_dict()
    if tied:
        del base["lm_head.weight"]
    shared = {name: torch.rand(value.shape) < 0.2 for name, value in base.items()}
    for number, name in enumerate(("base", "a", "b", "c")):
        folder = root / name
        config.save_pretrained(folder)
        state = {}
        for tensor, value in base.items():
            same = shared[tensor] | (torch.rand(value.shape) < 0.1 * number)
            moved = (value.double() + 0.1 * torch.randn(value.shape)).to(dtype)
            state[tensor] = value.clone() if number == 0 else torch.where(same, value, moved)
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if tokenizer:
            _save_tokenizer(folder, rotated=number)
    return root


def _save_tokenizer(folder: Path, rotated: int) -> None:
    words = [f"w{(index + rotated) % (TOKENS - 1)}" for index in range(TOKENS - 1)]
    vocabulary = {"<unk>": 0, **{word: index + 1 for index, word in enumerate(words)}}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)


def recipe(root: Path, method: str = "parameter_selection_resampling", **keys: Any) -> dict[str, Any]:
    """Return a recipe of the three sub-models of a family."""
    return {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name)} for name in "abc"],
        **keys,
    }


def merge(recipe_: dict[str, Any], out: Path, **options: Any) -> Path:
    """Merge in this process, as mergekit-yaml would."""
    source = yaml.safe_dump(recipe_)
    LoaderCache.loaders.clear()
    options = {"quiet": True, "copy_tokenizer": False, **options}
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    run_merge(config, str(out), MergeOptions(**options), config_source=source)
    LoaderCache.loaders.clear()
    return out


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors checkpoint."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        result.update(safetensors.torch.load_file(path))
    return result


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write an unsharded checkpoint's tensors anew."""
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def copied(folder: Path, to: Path) -> Path:
    """Copy a checkpoint."""
    return Path(shutil.copytree(folder, to))


def edit_json(path: Path, **keys: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


os.environ.setdefault("HF_HUB_OFFLINE", "1")
