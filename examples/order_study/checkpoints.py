"""A trained model on disk: a Hugging Face checkpoint, beside it the record of its making and a model card."""

import platform
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import transformers
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from order_study.folders import FolderRecord, file_digest, read_record, write_record, writing
from order_study.settings import Run

RECORD = "training.json"
WEIGHTS = "model.safetensors"


class Origin(BaseModel):
    """What a model is made from: with the versions in use and the machine, all that decides its bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    program: Literal[1] = 1  # raised when a change to the program changes the models it makes
    run: Run
    text_sha256: str  # of the part it is trained on
    start_sha256: str | None  # of the weights it starts from


class ModelRecord(FolderRecord):
    """The contents of training.json: no times and no paths, so that equal models have equal records."""

    origin: Origin
    weights_sha256: str
    made_with: dict[str, str]


def is_outdated(folder: Path, origin: Origin) -> bool:
    """Whether a folder holds a model of other settings or of another text, whatever it started from."""
    record = read_record(folder, RECORD, ModelRecord)
    if record is None:
        return folder.exists()
    return record.origin.model_copy(update={"start_sha256": None}) != origin


def is_finished(folder: Path, origin: Origin) -> bool:
    """Whether a folder holds the model wanted, with the very weights that were saved."""
    record = read_record(folder, RECORD, ModelRecord)
    weights = folder / WEIGHTS
    return (
        record is not None
        and record.origin == origin
        and weights.is_file()
        and file_digest(weights) == record.weights_sha256
    )


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: Origin) -> None:
    """Save model, tokenizer, record and card as one finished folder."""
    with writing(folder) as unfinished:
        model.to(torch.bfloat16).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        record = ModelRecord(
            origin=origin,
            weights_sha256=file_digest(unfinished / WEIGHTS),
            made_with={
                "python": platform.python_version(),
                "tokenizers": tokenizers.__version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
        )
        (unfinished / "README.md").write_text(_card(origin.run), encoding="utf-8")
        write_record(unfinished, RECORD, record)


def _card(run: Run) -> str:
    training = run.training
    made = (
        f"A base model, trained from fresh weights of seed {training.seed}."
        if run.start is None
        else f"A sub-model of an order study, fine-tuned from `{run.start}` as are its siblings.\n"
        "They differ from it in the order of the training data and in nothing else."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
---

# {run.name}

{made}

- **Order seed: {run.order}**
- Text: the {run.part.replace("_", "-")} part of `pydoc_data.topics`, which every CPython carries
- {training.epochs} epochs in batches of {training.batch_size}, drawn anew with the order
- AdamW, learning rate {training.learning_rate:g} ({training.schedule} schedule, {training.warmup_steps} \
steps of warm-up), weight decay {training.weight_decay:g}
- Weights trained in {training.precision}, saved as {training.saved_as}

All settings are in `training.json`. The model is too small to be of use for anything but trying out merges.
"""
