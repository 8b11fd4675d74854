"""The parts as the models of a study see them: token ids, without what is too long for the context."""

import os
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from order_study.digests import weights_digest
from order_study.errors import StudyError
from order_study.evaluation import load_tokenizer
from order_study.example import Example, digest
from order_study.folders import FolderRecord, read_record, write_record
from order_study.parts import Parts, read_part
from order_study.settings import BASE, Part
from order_study.tokens import Encoded, context_length, encode

TEXT_FOLDER = "text"
RECORD = "counts.json"


class Counts(FolderRecord):
    """How many samples each part has, and which of its examples were left out because too long."""

    context: int  # tokens
    samples: dict[Part, int]
    left_out: dict[Part, tuple[int, ...]]  # indices in the part on disk
    base_sha256: str
    text_sha256: dict[Part, str]


def ensure_counts(models: Path, parts: Parts) -> Counts:
    """Count the samples of each part with the base's tokenizer, unless that was done before.

    Raises:
        StudyError: Every sample of a part is too long.
    """
    folder = models / TEXT_FOLDER
    base_sha256 = weights_digest(models / BASE)
    text_sha256 = {part: digest(examples) for part, examples in parts.items()}
    if (folder / RECORD).exists():
        counts = read_record(folder, RECORD, Counts)
        if counts is not None and (counts.base_sha256, counts.text_sha256) == (base_sha256, text_sha256):
            return counts
    tokenizer, context = _reader(models)
    encoded = {part: encode_some(part, examples, tokenizer, context) for part, examples in parts.items()}
    counts = Counts(
        context=context,
        samples={part: len(one.samples) for part, one in encoded.items()},
        left_out={part: tuple(one.left_out) for part, one in encoded.items()},
        base_sha256=base_sha256,
        text_sha256=text_sha256,
    )
    write_record(folder, f"{RECORD}.unfinished", counts)
    os.replace(folder / f"{RECORD}.unfinished", folder / RECORD)
    return counts


def read_counts(models: Path) -> Counts:
    """What was counted when the models in a folder were trained.

    Raises:
        StudyError: Nothing was.
    """
    folder = models / TEXT_FOLDER
    counts = read_record(folder, RECORD, Counts) if (folder / RECORD).exists() else None
    if counts is None:
        raise StudyError(f"samples are counted in training, but {folder} has no {RECORD} of this version: train first")
    return counts


def encoded_part(models: Path, part: Part) -> Encoded:
    """One part of a study on disk as token ids: the samples that its models were trained on, in the order of the file.

    Raises:
        StudyError: There is no base or no such part, or every sample is too long.
    """
    return encode_some(part, read_part(models / TEXT_FOLDER, part), *_reader(models))


def encode_some(part: Part, examples: list[Example], tokenizer: PreTrainedTokenizerBase, context: int) -> Encoded:
    """Encode a part, of which something must be left.

    Raises:
        StudyError: Every sample is too long.
    """
    encoded = encode(examples, tokenizer, context)
    if not encoded.samples:
        raise StudyError(
            f"a sample must fit the context of {context} tokens, but none of the {len(examples)} of the {part} part "
            "does: shorten the samples, or take a base with a longer context"
        )
    return encoded


def _reader(models: Path) -> tuple[PreTrainedTokenizerBase, int]:
    base = models / BASE
    tokenizer = load_tokenizer(base)
    return tokenizer, context_length(AutoConfig.from_pretrained(base), tokenizer)
