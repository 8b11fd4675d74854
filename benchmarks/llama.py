"""Llamas of random weights on disk, and the check of what was merged from them.

Run as `python benchmarks/llama.py write FOLDER SIZE` or `python benchmarks/llama.py check FOLDER SIZE METHOD MERGED`.
The whole-process benchmark runs it as a process of its own, and so never imports torch itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import correctness
import inputs
from inputs import Inputs

BASE = "base"
SUB_MODELS = ("sub-1", "sub-2", "sub-3", "sub-4")
UNCHANGED = 0.5
_COMPLETE = "complete"  # is written last

# The shape of a small Llama with grouped-query attention; 223 M parameters.
_FULL = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
# 1.0 G parameters.
_LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 32}
_TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES: Mapping[str, Mapping[str, Any]] = {"full": _FULL, "large": {**_FULL, **_LARGE}, "tiny": {**_FULL, **_TINY}}
_SHARD_BYTES = {"full": 128 << 20, "large": 1 << 30, "tiny": 64 << 10}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape, in the order in which transformers saves them."""
    s = SIZES[size]
    hidden, inner = s["hidden_size"], s["intermediate_size"]
    keys = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    result: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (s["vocab_size"], hidden),
        "model.embed_tokens.weight": (s["vocab_size"], hidden),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (keys, hidden),
    }
    for number in range(s["num_hidden_layers"]):
        result |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return result | {"model.norm.weight": (hidden,)}


def write(folder: Path, size: str) -> None:
    """Write base and sub-models, unless a whole set is there."""
    if (folder / _COMPLETE).exists():
        return
    for model, name in enumerate((BASE, *SUB_MODELS)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        _write_config(folder / name, size)
        _write_shards(folder / name, _tensors(model, size), _SHARD_BYTES[size])
    (folder / _COMPLETE).touch()


def _tensors(model: int, size: str) -> Iterator[tuple[str, torch.Tensor]]:
    for number, (name, shape) in enumerate(shapes(size).items()):
        tensor = inputs.random_tensor(shape, torch.bfloat16, seed=number)
        yield name, tensor if model == 0 else inputs.fine_tuned(tensor, UNCHANGED, seed=1000 * model + number)


def _write_config(folder: Path, size: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **SIZES[size]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], limit: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _read(folder: Path, name: str) -> torch.Tensor:
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(folder / file, framework="pt") as shard:
        tensor: torch.Tensor = shard.get_tensor(name)
    return tensor


def check(folder: Path, size: str, method: str, merged: Path) -> None:
    """Raise unless a merge has every tensor, each right for its method."""
    for name in shapes(size):
        given = Inputs(_read(folder / BASE, name), tuple(_read(folder / model, name) for model in SUB_MODELS))
        result = _read(merged, name)
        if method == "parameter_selection":
            correctness.check_selection(given, result, name)
        elif method == "parameter_selection_resampling":
            correctness.check_resampling(given, result, name=name)
        elif method.startswith("benchmark_"):
            correctness.check_copy(given, result)
        else:
            correctness.check_finite(given, result)


if __name__ == "__main__":
    command, folder, size, *rest = sys.argv[1:]
    if command == "write":
        write(Path(folder), size)
    else:
        check(Path(folder), size, rest[0], Path(rest[1]))
