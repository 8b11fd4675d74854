"""Held-out loss of models on disk."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from order_study.errors import StudyError
from order_study.tokens import Sample, encode
from order_study.training import reproducible

_BATCH = 16


@dataclass(frozen=True)
class HeldOut:
    """Loss of one model on held-out samples."""

    loss: float  # mean over all predicted tokens, in nats
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, never from a hub.

    Raises:
        StudyError: The folder is not a checkpoint with a tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise StudyError(
            f"a model must be a folder with a Hugging Face checkpoint, but {folder} has no config.json: "
            "train or merge it first"
        )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    # Traces of how it was loaded, HF_HUB_OFFLINE among them, which transformers would save with a sub-model.
    for trace in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(trace, None)
    return tokenizer


def held_out_loss(folder: Path, passages: list[str]) -> tuple[HeldOut, list[Sample]]:
    """Load a model and measure its loss on passages; also return these as its own tokenizer sees them.

    Whatever the weights are stored as, the loss is computed in fp32.
    """
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model.eval()
    samples = encode(passages, tokenizer, model.config.max_position_embeddings)
    collate = DataCollatorForSeq2Seq(tokenizer)
    total, count = 0.0, 0
    with torch.inference_mode(), reproducible(threads=1):
        for start in range(0, len(samples), _BATCH):
            batch = collate(samples[start : start + _BATCH])
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            total += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += int((labels != -100).sum())
    return HeldOut(loss=total / count, tokens=count), samples
