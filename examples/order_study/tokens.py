"""Tokenizers, and samples as token ids with a loss on the response alone."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from order_study.errors import StudyError
from order_study.example import Example

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
NO_LOSS = -100

Sample = dict[str, list[int]]


@dataclass(frozen=True)
class Encoded:
    """A part as token ids, without what is too long for the model."""

    samples: list[Sample]
    left_out: list[int]  # indices of the examples that have more tokens than the context holds


def train_tokenizer(passages: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts a start token before a text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: no text is out of vocabulary
        show_progress=False,
    )
    tokenizer.train_from_iterator(passages, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # as transformers ships it
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def existing_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
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


def encode(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, context: int) -> Encoded:
    """Turn each example into a sample: prompt with special tokens, response, end token.

    Prompt and response are split into tokens apart, so that none spans both. The loss is on the response and on
    the end token; without a prompt, on all but the start token.
    """
    encoded = Encoded([], [])
    for index, example in enumerate(examples):
        prompt = prompt_ids(example.prompt, tokenizer)
        # Not verbose: transformers warns once of what is too long, which is counted and told here.
        ids = tokenizer(example.response, add_special_tokens=False, verbose=False)["input_ids"]
        response = [*ids, tokenizer.eos_token_id]
        if len(prompt) + len(response) > context:
            encoded.left_out.append(index)
        else:
            labels = [NO_LOSS] * len(prompt) + response
            encoded.samples.append({"input_ids": prompt + response, "labels": labels})
    return encoded


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt as a model is to continue it: with the special tokens of the start, without those of the end."""
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Makes batches of samples; pads with the end token where the tokenizer has no token for it.

    The tokenizer itself stays as it is, and with it what is saved. What is padded has no loss and is not attended to.
    """
    if tokenizer.pad_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer)
