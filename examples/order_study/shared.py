"""Batches of samples that begin alike: what all begin with goes through a model once, the rest after it.

A chat template puts the same tokens before every prompt. Their keys and values are the same for all samples, as no
token looks ahead, so they are computed once for a batch, with their gradient, and logits for the responses alone. The
loss is that of the whole samples up to rounding.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from examples.order_study.data.samples import NO_LOSS, Sample, prompt_length
from examples.order_study.errors import StudyError

Batch = dict[str, torch.Tensor]


def shared_prefix(samples: Sequence[Sample]) -> list[int]:
    """The tokens that all samples begin with; of no sample the last token before its response.

    Raises:
        StudyError: There are none.
    """
    limit = min(prompt_length(sample) for sample in samples) - 1
    first = samples[0]["input_ids"]
    length = 0
    while length < limit and all(sample["input_ids"][length] == first[length] for sample in samples):
        length += 1
    if not length:
        raise StudyError(
            "shared_prefix needs samples that begin with the same tokens, but these share none: leave the setting out"
        )
    return first[:length]


@dataclass(frozen=True)
class Aligned:
    """Makes batches of samples without their shared prefix, padded on the left so that responses end together."""

    prefix: Sequence[int]

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of n samples, of which the longest has L tokens after the prefix, and R in its response.

        Returns:
            input_ids [n, L] and position_ids [n, L] of what follows the prefix, attention_mask [n, P + L] with the P
            tokens of the prefix, labels [n, R + 1]: nothing, then the response.
        """
        shared = len(self.prefix)
        tokens = [sample["input_ids"][shared:] for sample in samples]
        responses = [sample["labels"][prompt_length(sample) :] for sample in samples]
        rows, longest = len(samples), max(map(len, tokens))
        ids, places = (torch.zeros((rows, longest), dtype=torch.long) for _ in range(2))
        mask = torch.ones((rows, shared + longest), dtype=torch.long)
        labels = torch.full((rows, 1 + max(map(len, responses))), NO_LOSS)
        for row, (own, response) in enumerate(zip(tokens, responses, strict=True)):
            start = longest - len(own)
            ids[row, start:] = torch.tensor(own)
            places[row, start:] = torch.arange(shared, shared + len(own))
            mask[row, shared : shared + start] = 0
            labels[row, labels.shape[1] - len(response) :] = torch.tensor(response)
        return {"input_ids": ids, "position_ids": places, "attention_mask": mask, "labels": labels}


def response_logits(
    model: Callable[..., Any], kind: PreTrainedModel, prefix: Sequence[int], batch: Batch
) -> torch.Tensor:
    """[n, R, vocabulary] logits of the tokens at `batch["labels"][:, 1:]`.

    Args:
        model: What is called; a Trainer wraps the model.
        kind: The model itself, which says how it takes a cache.
        prefix: The tokens that the samples of the batch have lost.
        batch: Made by `Aligned`.
    """
    plain: Any = kind
    if hasattr(kind, "get_base_model"):  # an adapter is around it
        plain = plain.get_base_model()
    # transformers renamed the argument in 5.2x, and warns of the old name.
    name = "cache" if "cache" in inspect.signature(type(plain).forward).parameters else "past_key_values"
    rows, responses = len(batch["input_ids"]), batch["labels"].shape[1] - 1
    cache: Any = DynamicCache(config=plain.config)
    ids = torch.tensor([list(prefix)], device=batch["input_ids"].device)
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
    cache.batch_repeat_interleave(rows)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=True,
        logits_to_keep=responses + 1,
        **{name: cache},
    )
    logits: torch.Tensor = output.logits[:, :-1]
    return logits
