"""Held-out loss of models on disk."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from order_study.errors import StudyError
from order_study.example import Example
from order_study.losses import load_model, sample_losses
from order_study.tokens import Sample, context_length, encode, existing_tokenizer
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
    return existing_tokenizer(str(folder))


def held_out_loss(folder: Path, examples: list[Example]) -> tuple[HeldOut, list[Sample]]:
    """Load a model and measure its loss on examples; also return these as its own tokenizer sees them.

    Whatever the weights are stored as, the loss is computed in fp32.
    """
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch.device("cpu"))
    samples = encode(examples, tokenizer, context_length(model.config, tokenizer)).samples
    with reproducible(threads=1):
        losses = sample_losses(model, samples, _BATCH)
    return HeldOut(loss=losses.mean(), tokens=int(losses.tokens.sum())), samples
