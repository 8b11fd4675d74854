"""Samples as token ids, with a loss on the response alone."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, DataCollatorForSeq2Seq, PretrainedConfig, PreTrainedTokenizerBase

from examples.order_study.data.parts import Example, Parts
from examples.order_study.errors import StudyError
from examples.order_study.settings import Part
from examples.order_study.sources import Data, Text

NO_LOSS = -100

Sample = dict[str, list[int]]


@dataclass(frozen=True)
class Samples:
    """A part as the models of a study see it, without what is too long for them."""

    part: Part
    samples: list[Sample]
    responses: list[str]  # of the samples, as text
    left_out: int  # examples that are too long


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, from a folder or from the hub.

    Raises:
        StudyError: There is none, or it has no end token.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError, TypeError, AttributeError, KeyError) as error:
        raise StudyError(
            f"a model needs a tokenizer, but {source} has none that transformers loads "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}): put the files "
            "of its tokenizer beside its weights"
        ) from error
    # Without files transformers may make up an empty one for the architecture.
    if not tokenizer("a b c", add_special_tokens=False)["input_ids"]:
        raise StudyError(
            f"a model needs a tokenizer, but {source} has one without a vocabulary: put the files of its tokenizer "
            "beside its weights"
        )
    if tokenizer.eos_token_id is None:
        raise StudyError(
            f"a response ends with the tokenizer's end token, but that of {source} has none: set eos_token in its "
            "tokenizer_config.json"
        )
    # Traces of how it was loaded, HF_HUB_OFFLINE among them, which transformers would save with a sub-model.
    for trace in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(trace, None)
    return tokenizer


def context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens that a model can see at once, as its configuration or else its tokenizer says."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions or tokenizer.model_max_length)


def encode(parts: Parts, data: Data, tokenizer: PreTrainedTokenizerBase, context: int) -> dict[Part, Samples]:
    """Turn the examples of each part into samples that fit the context and the limit of the settings.

    Raises:
        StudyError: A part has none that fits.
    """
    limit, chat = context, False
    if not isinstance(data, Text):
        limit, chat = min(context, data.max_tokens or context), data.chat_template
    if chat and tokenizer.chat_template is None:
        raise StudyError(
            "data.chat_template must be that of the base's tokenizer, but this has none: leave the setting out, or "
            "take a base that was trained to chat"
        )
    return {
        part: encode_part(part, examples, tokenizer, limit, chat and part != "base") for part, examples in parts.items()
    }


def encode_part(
    part: Part, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int, chat: bool = False
) -> Samples:
    """Turn each example into a sample: prompt with special tokens, response, end token.

    Prompt and response are split into tokens apart, so that none spans both. The loss is on the response and on
    the end token; without a prompt, on all but the start token.
    """
    made = Samples(part, [], [], 0)
    for example in examples:
        prompt = _chat_ids(example.prompt, tokenizer) if chat else prompt_ids(example.prompt, tokenizer)
        # Not verbose: transformers warns once of what is too long, which is counted and told here.
        ids = tokenizer(example.response, add_special_tokens=False, verbose=False)["input_ids"]
        response = [*ids, tokenizer.eos_token_id]
        if len(prompt) + len(response) <= limit:
            made.samples.append({"input_ids": prompt + response, "labels": [NO_LOSS] * len(prompt) + response})
            made.responses.append(example.response)
    if not made.samples:
        raise StudyError(
            f"a sample must fit {limit} tokens, but none of the {len(examples)} of the {part} part does: shorten the "
            "samples, raise data.max_tokens, or take a base with a longer context"
        )
    return Samples(part, made.samples, made.responses, len(examples) - len(made.samples))


def prompt_length(sample: Sample) -> int:
    """How many tokens of a sample come before its response."""
    return next(place for place, label in enumerate(sample["labels"]) if label != NO_LOSS)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt as a model is to continue it: with the special tokens of the start, without those of the end."""
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def _chat_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    said = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template has its own
    return ids


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Makes batches of samples; pads with the end token where the tokenizer has no token for it.

    The tokenizer itself stays as it is, and with it what is saved. What is padded has no loss and is not attended to.
    """
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer)
