"""A model on disk: a Hugging Face checkpoint, beside it the record of its making and a model card."""

import copy
import platform
from pathlib import Path
from typing import Literal, cast

import tokenizers
import torch
import transformers
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from order_study.card import given_card, trained_card
from order_study.digests import weights_digest
from order_study.folders import FolderRecord, read_record, write_record, writing
from order_study.lora import ADAPTER, is_adapted, merged, save_adapter
from order_study.settings import Run, Stored

RECORD = "training.json"
WEIGHTS = "model.safetensors"


class Origin(BaseModel):
    """What a model is made from: with the versions in use and the machine, all that decides its bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    program: Literal[2] = 2  # raised when a change to the program changes the models it makes
    run: Run
    text_sha256: str  # of the part it is trained on
    start_sha256: str | None  # of the weights it starts from


class GivenOrigin(BaseModel):
    """Where a base that was given comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    revision: str | None
    saved_as: Stored
    source_sha256: str | None  # of the files of a local folder


class ModelRecord(FolderRecord):
    """The contents of training.json: no times and no places, so that equal models have equal records."""

    origin: Origin | GivenOrigin
    step: int | None = None  # after how many steps, where a state from the midst of a training was saved
    weights_sha256: str
    made_with: dict[str, str]


def made_with() -> dict[str, str]:
    """The versions in use that may decide bits."""
    return {
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def is_outdated(folder: Path, origin: Origin | GivenOrigin) -> bool:
    """Whether a folder holds a model of other settings or of another text, whatever it started from."""
    record = read_record(folder, RECORD, ModelRecord)
    if record is None:
        return folder.exists()
    held = record.origin
    return (held.model_copy(update={"start_sha256": None}) if isinstance(held, Origin) else held) != origin


def is_finished(folder: Path, origin: Origin | GivenOrigin, step: int | None = None) -> bool:
    """Whether a folder holds the model wanted, with the very weights that were saved."""
    record = read_record(folder, RECORD, ModelRecord)
    return (
        record is not None
        and record.origin == origin
        and record.step == step
        and any(folder.glob("*.safetensors"))
        and weights_digest(folder) == record.weights_sha256
    )


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    origin: Origin | GivenOrigin,
    text: str = "",
    step: int | None = None,
) -> None:
    """Save model, tokenizer, record and card as one finished folder; the model itself stays as it is.

    An adapter is merged into the weights, and saved beside them. `text` names what the model was trained on.
    """
    with writing(folder) as unfinished:
        if isinstance(origin, GivenOrigin):
            stored, card = origin.saved_as, given_card(origin.model, origin.revision, origin.saved_as)
        else:
            stored, card = origin.run.training.saved_as, trained_card(origin.run, step, text)
        _stored(model, stored).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if is_adapted(model):
            save_adapter(unfinished / ADAPTER, model)
        record = ModelRecord(origin=origin, step=step, weights_sha256=weights_digest(unfinished), made_with=made_with())
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        write_record(unfinished, RECORD, record)


def _stored(model: PreTrainedModel, stored: Stored) -> PreTrainedModel:
    """A copy of the model in main memory and in the dtype of the disk, with no adapter left in it."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[stored]
    # An adapter is added in fp32, whatever the weights are in: one rounding instead of two.
    working = torch.float32 if is_adapted(model) else dtype
    # What deepcopy finds in its memo it takes as copied: no second model in the memory of an accelerator.
    memo = {
        id(parameter): torch.nn.Parameter(parameter.detach().to("cpu", working, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    copied: torch.nn.Module = copy.deepcopy(model, memo)
    copied.to("cpu")  # its buffers
    plain: torch.nn.Module = merged(copied) if is_adapted(model) else copied
    return cast(PreTrainedModel, plain.to(dtype))
