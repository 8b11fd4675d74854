"""Measure one model, loaded once for all that is missing of it, and keep the results on disk."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from order_study.cache import Entry, Key, write_entry
from order_study.evaluation import load_tokenizer
from order_study.exact_match import answers, prompt_of
from order_study.losses import load_model, sample_losses
from order_study.tokens import Sample
from order_study.training import reproducible
from order_study.weights import share_equal


@dataclass(frozen=True)
class Task:
    """What is missing of one model: each measurement with its samples and the files that it goes to."""

    folder: Path
    base: Path
    context: int
    missing: Sequence[tuple[Key, Sequence[Sample], Sequence[Path]]]


def measure_model(task: Task) -> None:
    """Make all measurements of a task; each is on disk as soon as it is made."""

    @functools.cache
    def model(device: str) -> PreTrainedModel:
        return load_model(task.folder, torch.device(device))

    for key, samples, files in task.missing:
        if key.what == "weights":
            entry = Entry(key=key, equal_to_base=share_equal(task.folder, task.base))
        else:
            with reproducible(key.threads):
                entry = _measured(task, key, samples, model(key.device))
        for file in files:
            write_entry(file, entry)


def _measured(task: Task, key: Key, samples: Sequence[Sample], model: PreTrainedModel) -> Entry:
    if key.what == "exact_match":
        prompts = [prompt_of(sample) for sample in samples]
        tokenizer = load_tokenizer(task.folder)
        texts = answers(model, tokenizer, prompts, key.max_new_tokens, task.context, key.batch_size)
        return Entry(key=key, answers=texts)
    losses = sample_losses(model, samples, key.batch_size)
    return Entry(key=key, total=losses.total.tolist(), tokens=losses.tokens.tolist())
