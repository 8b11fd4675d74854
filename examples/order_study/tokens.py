"""A small byte-level BPE tokenizer, and passages as token ids."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from order_study.errors import StudyError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

Sample = dict[str, list[int]]


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


def encode(passages: Iterable[str], tokenizer: PreTrainedTokenizerBase, context: int) -> list[Sample]:
    """Turn each passage into a sample: start token, text, end token, with a loss on all but the first.

    Raises:
        StudyError: A passage has more tokens than the context holds.
    """
    samples: list[Sample] = []
    for passage in passages:
        ids = [*tokenizer(passage)["input_ids"], tokenizer.eos_token_id]
        if len(ids) > context:
            raise StudyError(
                f"a passage must fit the context of {context} tokens, got {len(ids)} in {passage[:40]!r}: "
                "lower passage_characters or raise max_position_embeddings"
            )
        samples.append({"input_ids": ids, "labels": ids})
    return samples
