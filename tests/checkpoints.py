"""Small checkpoints on disk for end-to-end tests, and the stock command that merges them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

VOCAB = 96
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def llama_config(**changes):
    from transformers import LlamaConfig

    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaConfig(**{**settings, **changes})


def write_llama(folder: Path, seed: int, near: Path | None = None, moved: float = 0.6, shard="5GB", dtype="bfloat16"):
    """Save a random Llama, or one that moved a share of another's parameters; return the folder."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama_config()).to(getattr(torch, dtype))
        if near is not None:
            before = tensors_of(near)
            for name, parameter in model.named_parameters():
                stays = torch.rand(parameter.shape) >= moved
                parameter.data = torch.where(stays, before[name].to(parameter.dtype), parameter.data)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{k}": k for k in range(VOCAB - 1)} | {"<unk>": VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read without mergekit."""
    result: dict[str, torch.Tensor] = {}
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for shard in shards:
        result.update(load_file(folder / shard))
    return result


def reshard(source: Path, target: Path, count: int) -> Path:
    """Copy a checkpoint, its tensors dealt out to another number of shards."""
    target.mkdir()
    for file in source.iterdir():
        if "safetensors" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    tensors = tensors_of(source)
    weight_map = {}
    for part in range(count):
        names = sorted(tensors)[part::count]
        shard = f"model-{part + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, target / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every tensor's name, dtype, shape and bytes."""
    return {
        name: hashlib.sha256(
            f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode()
            + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors_of(folder).items()
    }


def recipe(method: str, base: Path | None, models, *, model_parameters=None, **changes) -> dict:
    result = {
        "merge_method": method,
        "models": [
            {"model": str(m)} | ({"parameters": model_parameters[k]} if model_parameters else {})
            for k, m in enumerate(models)
        ],
        **changes,
    }
    if base is not None:
        result["base_model"] = str(base)
    return result


def run(command: str, *arguments, env=None, cwd=None) -> subprocess.CompletedProcess[str]:
    """Run a console script of the environment that the tests run in."""
    program = Path(sys.executable).with_name(command)
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
    )


def merge(tmp_path: Path, config: dict, *options, name="out", env=None) -> subprocess.CompletedProcess[str]:
    """Run the stock mergekit-yaml on a recipe; the result goes to tmp_path / name."""
    file = tmp_path / f"{name}.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return run("mergekit-yaml", file, tmp_path / name, *options, env=env)


def merge_here(tmp_path: Path, config: dict, name="out", **options) -> Path:
    """The same in this process, for tests of what the command would do too; seconds faster."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge

    LoaderCache.loaders.clear()  # global to the process, and stale once a checkpoint is written anew
    run_merge(
        MergeConfiguration.model_validate(config), str(tmp_path / name), options=MergeOptions(quiet=True, **options)
    )
    return tmp_path / name


def run_here(command: str, *arguments) -> None:
    """Call what a console script calls, in this process: seconds faster than `run`."""
    from importlib.metadata import entry_points

    from mergekit.io.tasks import LoaderCache

    LoaderCache.loaders.clear()
    (script,) = entry_points(group="console_scripts", name=command)
    script.load().main(args=[str(argument) for argument in arguments], prog_name=command, standalone_mode=False)


def finished(folder: Path) -> bool:
    """Whether a folder looks like a model: a config, or weights under the name that transformers loads."""
    return any(
        (folder / file).exists()
        for file in ("config.json", "model.safetensors", "model.safetensors.index.json", "mergekit_config.yml")
    )
