"""A base that exists already: loaded by transformers, and saved where everything later reads it."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from examples.order_study.data.records import expand, with_variables
from examples.order_study.data.samples import load_tokenizer
from examples.order_study.errors import StudyError
from examples.order_study.settings import GivenBase, Stored
from examples.order_study.store.folders import digest, file_digest, read_record
from examples.order_study.train.checkpoints import given_card, save

_DECIDING = {".safetensors", ".bin", ".gguf", ".json", ".model", ".txt"}  # weights, configuration, tokenizer


def given_from(base: GivenBase, saved_as: Stored, folder: Path) -> dict[str, Any]:
    """What the base is made from; a source that is gone, though `folder` holds what was made of it, is as it was."""
    source, sha256 = expand(base.model), None
    if source.is_dir():
        files = [file for file in sorted(source.iterdir()) if file.is_file() and file.suffix in _DECIDING]
        sha256 = digest({file.name: file_digest(file) for file in files})
    elif (record := read_record(folder)) is not None:
        sha256 = record.made_from.get("source_sha256")
    return {**base.model_dump(), "saved_as": saved_as, "source_sha256": sha256}


def save_given(folder: Path, base: GivenBase, saved_as: Stored, made_from: dict[str, Any]) -> None:
    """Load a base and save it in `folder`, in the dtype that its sub-models are saved in.

    Raises:
        StudyError: It is not there, transformers cannot load it, or it has no tokenizer.
    """
    name = with_variables(base.model)
    source = Path(name)
    if name.startswith((".", "/", "~")) and not source.is_dir():
        raise StudyError(
            f"a base must be a folder with a checkpoint or an id on the hub, but there is no folder {name}: "
            "correct base.model; a relative path counts from here"
        )
    if any(source.glob("*.gguf")) and not (source / "config.json").is_file():
        raise StudyError(
            f"a base must be a checkpoint in safetensors, but {name} holds GGUF weights: load these with "
            "transformers' `gguf_file`, dequantised (`GgufConfig(dequantize=True)` where transformers has it), and "
            "save model and tokenizer in a folder of their own"
        )
    tokenizer = load_tokenizer(name, base.revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, revision=base.revision, dtype="auto")
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise StudyError(
            f"a base must be a causal language model that transformers loads, but {name} is not "
            f"({str(error).strip().splitlines()[0]}): give a folder with a checkpoint or an id on the hub, and mind "
            "that HF_HUB_OFFLINE keeps from downloading"
        ) from error
    vocabulary = len(cast(torch.Tensor, model.get_input_embeddings().weight))
    if len(tokenizer) > vocabulary:
        raise StudyError(
            f"a tokenizer must give ids that the model knows, but that of {name} has {len(tokenizer)} tokens for "
            f"{vocabulary} rows of the embedding: resize the embedding and save the base with it"
        )
    save(folder, model, tokenizer, saved_as, made_from, given_card(base, saved_as))
