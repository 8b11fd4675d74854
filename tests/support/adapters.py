"""LoRA adapters of the small Llamas, as peft saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file


def write_adapter(folder: Path, rows: int = 48, layer: str = "model.layers.0.mlp", **settings: Any) -> Path:
    """Save what peft saves for a LoRA of one layer's up_proj."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    up = f"base_model.model.{layer}.up_proj"
    tensors = {f"{up}.lora_A.weight": torch.ones(2, 32), f"{up}.lora_B.weight": torch.ones(rows, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def train_adapters(base: Path, folder: Path, count: int = 3) -> list[Path]:
    """Save adapters with peft itself, of random values."""
    import peft

    result = []
    for number in range(count):
        model: Any = tf.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
        with torch.random.fork_rng():
            torch.manual_seed(number)
            model = peft.get_peft_model(model, settings)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data = 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
        result.append(folder / f"adapter-{number}")
        model.save_pretrained(result[-1])
    return result


def cached_merge(cache: Path, reference: str) -> Path:
    """Where mergekit keeps the merge of a `base+adapter`."""
    from mergekit.common import ModelReference

    parsed: Any = ModelReference.parse(reference)
    return cache / f"{parsed.model._unique_id()}_{parsed.lora._unique_id()}"
