"""A base that exists already: loaded by transformers, and saved where everything later reads it."""

import hashlib
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM

from order_study import checkpoints
from order_study.checkpoints import GivenOrigin
from order_study.errors import StudyError
from order_study.folders import file_digest, read_record
from order_study.settings import GivenBase, Stored
from order_study.tokens import existing_tokenizer

_DECIDING = {".safetensors", ".bin", ".json", ".model", ".txt"}  # weights, configuration, tokenizer


def given_origin(base: GivenBase, saved_as: Stored, folder: Path) -> GivenOrigin:
    """Where a base comes from; a source that is gone, though `folder` holds what was made of it, is as it was."""
    source = Path(base.model)
    origin = GivenOrigin(model=base.model, revision=base.revision, saved_as=saved_as, source_sha256=None)
    if source.is_dir():
        digest = hashlib.sha256()
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in _DECIDING:
                digest.update(f"{file.name} {file_digest(file)}\n".encode())
        return origin.model_copy(update={"source_sha256": digest.hexdigest()})
    record = read_record(folder, checkpoints.RECORD, checkpoints.ModelRecord)
    if record is not None and isinstance(record.origin, GivenOrigin):
        return origin.model_copy(update={"source_sha256": record.origin.source_sha256})
    return origin


def save_given(folder: Path, base: GivenOrigin) -> None:
    """Load a base and save it in `folder`, in the dtype that its sub-models are saved in.

    Raises:
        StudyError: It is not there, transformers cannot load it, or it has no tokenizer.
    """
    if base.model.startswith((".", "/", "~")) and not Path(base.model).is_dir():
        raise StudyError(
            f"a base must be a folder with a checkpoint or an id on the hub, but there is no folder {base.model}: "
            "correct base.model; a relative path counts from here"
        )
    tokenizer = existing_tokenizer(base.model, base.revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(base.model, revision=base.revision, dtype="auto")
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise StudyError(
            f"a base must be a causal language model that transformers loads, but {base.model} is not "
            f"({str(error).strip().splitlines()[0]}): give a folder with a checkpoint or an id on the hub, and mind "
            "that HF_HUB_OFFLINE keeps from downloading"
        ) from error
    vocabulary = len(cast(torch.Tensor, model.get_input_embeddings().weight))
    if len(tokenizer) > vocabulary:
        raise StudyError(
            f"a tokenizer must give ids that the model knows, but that of {base.model} has {len(tokenizer)} tokens for "
            f"{vocabulary} rows of the embedding: resize the embedding and save the base with it"
        )
    checkpoints.save(folder, model, tokenizer, base)
