"""The loss of a model on each of many samples."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from examples.order_study.data.samples import NO_LOSS, Sample
from examples.order_study.errors import StudyError
from examples.order_study.measured import SampleLosses
from examples.order_study.shared import Aligned, Batch, response_logits


def load_model(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a model from a folder, in `dtype` whatever its weights are stored as, and without dropout.

    Raises:
        StudyError: transformers cannot load it.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError) as error:
        raise StudyError(
            f"a model must be one that transformers loads, but {folder} is not ({error}): make it again"
        ) from error
    model.to(device)  # type: ignore[arg-type]  # as transformers ships it
    model.eval()  # type: ignore[no-untyped-call]  # likewise
    return model


def sample_losses(
    models: Sequence[PreTrainedModel], samples: Sequence[Sample], batch_size: int, prefix: Sequence[int] = ()
) -> SampleLosses:
    """Measure a model on samples, or the mean of the probabilities that several models give to each token.

    The samples are measured shortest first, so that little is padded; that decides nothing but the last bits, since
    padding is not attended to and no token looks ahead.

    Args:
        models: In evaluation mode; one, or those of an ensemble.
        samples: Token ids and labels; a label of -100 has no loss.
        batch_size: How many are measured at a time.
        prefix: Tokens that all samples begin with and that go through a model once a batch; none: whole samples do.

    Returns:
        Of each sample, in the order of `samples`: its loss, its number of response tokens, and whether each of these
        is the likeliest after all before it. That is to say, whether greedy decoding gives the response.
    """
    total = np.zeros(len(samples))
    tokens = np.zeros(len(samples), dtype=np.int64)
    right = np.zeros(len(samples), dtype=np.bool_)
    with torch.inference_mode():
        for chosen in batches([len(sample["input_ids"]) for sample in samples], batch_size):
            some = [samples[index] for index in chosen]
            batch = Aligned(prefix)(some) if prefix else _padded(some)
            scores = _mean([_logits(model, batch, prefix) for model in models])
            # The labels move, not the logits: those are large, and a part of them would be a copy.
            labels = batch["labels"][:, 1:]
            if not prefix:
                labels = torch.cat([labels, torch.full_like(labels[:, :1], NO_LOSS)], dim=1)
            on_device = labels.to(scores.device)
            losses = cross_entropy(
                scores.flatten(0, 1), on_device.flatten(), reduction="none", ignore_index=NO_LOSS
            ).view(labels.shape)
            total[chosen] = losses.double().sum(dim=1).cpu().numpy()
            tokens[chosen] = (labels != NO_LOSS).sum(dim=1).numpy()
            matches = (scores.argmax(dim=-1) == on_device) | (on_device == NO_LOSS)
            right[chosen] = matches.all(dim=1).cpu().numpy()
    return SampleLosses(total=total, tokens=tokens, right=right)


def _logits(model: PreTrainedModel, batch: Batch, prefix: Sequence[int]) -> torch.Tensor:
    here = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if prefix:
        return response_logits(model, model, prefix, here).float()
    logits: torch.Tensor = model(input_ids=here["input_ids"], attention_mask=here["attention_mask"]).logits
    return logits.float()


def _mean(logits: list[torch.Tensor]) -> torch.Tensor:
    """Logits of one model as they are; of several, the logarithm of the mean of their probabilities."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([one.log_softmax(dim=-1) for one in logits]).logsumexp(dim=0) - math.log(len(logits))


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Cut the indices of samples into batches of like length, shortest first."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _padded(samples: Sequence[Sample]) -> Batch:
    """Token ids, attention mask and labels of samples, each [samples, longest], padded on the right."""
    shape = len(samples), max(len(sample["input_ids"]) for sample in samples)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, NO_LOSS)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        ids[row, :length] = torch.tensor(sample["input_ids"])
        labels[row, :length] = torch.tensor(sample["labels"])
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
