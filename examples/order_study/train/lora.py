"""LoRA through peft: an adapter is trained instead of the weights, and added to them when the model is saved."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from examples.order_study.settings import Training


def adapted(model: PreTrainedModel, training: Training) -> PreTrainedModel:
    """The model with a fresh adapter whose weights depend on the seed alone; without LoRA, the model itself."""
    lora = training.lora
    if lora is None:
        return model
    set_seed(training.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it, a whole number or not
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules is None else list(lora.target_modules),
    )
    return get_peft_model(model, config)  # type: ignore[return-value]  # as good as one


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether a model has an adapter."""
    return isinstance(model, PeftModel)


def with_adapter_added(model: torch.nn.Module) -> torch.nn.Module:
    """The weights with the adapter added to them; `model` is used up."""
    assert isinstance(model, PeftModel)
    plain: torch.nn.Module = model.merge_and_unload()
    return plain


def save_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Save the adapter alone; its files name no place on this machine, and are the same each time."""
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # peft's, with a path in it
    path = folder / "adapter_config.json"
    config = json.loads(path.read_bytes())
    config["base_model_name_or_path"] = None
    config["target_modules"] = sorted(config["target_modules"])  # a set, in the order of Python's hashes
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
