"""The loss of a model on each of many samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from examples.order_study.data.samples import NO_LOSS, Sample
from examples.order_study.errors import StudyError
from examples.order_study.measured import SampleLosses


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


def sample_losses(model: PreTrainedModel, samples: Sequence[Sample], batch_size: int) -> SampleLosses:
    """Measure a model on samples.

    The samples are measured shortest first, so that little is padded; that decides nothing but the last bits, since
    padding follows the sample and no token looks ahead.

    Args:
        model: In evaluation mode.
        samples: Token ids and labels; a label of -100 has no loss.
        batch_size: How many are measured at a time.

    Returns:
        Loss and number of response tokens, in the order of `samples`.
    """
    total = np.zeros(len(samples))
    tokens = np.zeros(len(samples), dtype=np.int64)
    with torch.inference_mode():
        for chosen in batches([len(sample["input_ids"]) for sample in samples], batch_size):
            ids, mask, labels = _padded([samples[index] for index in chosen])
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            # The labels move, not the logits: those are large, and a part of them would be a copy.
            following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], NO_LOSS)], dim=1)
            losses = cross_entropy(
                logits.float().flatten(0, 1),
                following.flatten().to(logits.device),
                reduction="none",
                ignore_index=NO_LOSS,
            )
            total[chosen] = losses.view(following.shape).double().sum(dim=1).cpu().numpy()
            tokens[chosen] = (following != NO_LOSS).sum(dim=1).numpy()
    return SampleLosses(total=total, tokens=tokens)


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Cut the indices of samples into batches of like length, shortest first."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _padded(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels of samples, each [samples, longest], padded on the right."""
    shape = len(samples), max(len(sample["input_ids"]) for sample in samples)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, NO_LOSS)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        ids[row, :length] = torch.tensor(sample["input_ids"])
        labels[row, :length] = torch.tensor(sample["labels"])
        mask[row, :length] = 1
    return ids, mask, labels
