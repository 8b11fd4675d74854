"""A trained model on disk: a Hugging Face checkpoint, the record of its making, and a model card."""

import copy
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.order_study.settings import GivenBase, Run, Stored
from examples.order_study.store.folders import Record, weights_digest, write_record, writing
from examples.order_study.store.places import ADAPTER, CURVE, RECORD
from examples.order_study.train.lora import is_adapted, save_adapter, with_adapter_added

MADE_WITH = {
    "python": platform.python_version(),
    "tokenizers": tokenizers.__version__,
    "torch": str(torch.__version__),
    "transformers": transformers.__version__,
}

_PRECISION = {
    "fp32": "weights and arithmetic in fp32",
    "bf16_mixed": "weights in fp32, arithmetic in bf16 (autocast)",
    "bf16": "weights and arithmetic in bf16",
}


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saved_as: Stored,
    made_from: dict[str, Any],
    card: str,
    curve: Sequence[Mapping[str, float]] = (),
) -> None:
    """Save a model, as a whole or not at all; an adapter is added to the weights, and saved beside them.

    The learning curve, where there is one, has a line of JSON for each step.
    """
    with writing(folder) as unfinished:
        _stored(model, saved_as).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if is_adapted(model):
            save_adapter(unfinished / ADAPTER, model)
        header = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        text = f"{header}# {folder.name}\n\n{card}\nAll settings are in `{RECORD}`.\n"
        (unfinished / "README.md").write_text(text, encoding="utf-8")
        if curve:
            (unfinished / CURVE).write_text("".join(json.dumps(step) + "\n" for step in curve), encoding="utf-8")
        record = Record(made_from=made_from, weights_sha256=weights_digest(unfinished), made_with=MADE_WITH)
        write_record(unfinished, record)


def trained_card(run: Run, text: str, step: int | None = None) -> str:
    """The card of a model, or of its state after `step` steps; `text` names what it was trained on."""
    training, lora = run.training, run.training.lora
    made = (
        f"A base model, trained from fresh weights of seed {training.seed}."
        if run.start is None
        else f"A sub-model of an order study, fine-tuned from `{run.start}` as are its siblings.\n"
        "They differ from it in the order of the training data and in nothing else."
    )
    if step is not None:
        made += f"\nThis is its state after {step} steps, from the midst of the training."
    drawn = (
        "drawn anew with the order"
        if run.composition == "redrawn"
        else "of fixed composition, which the order permutes"
    )
    weights = "All weights trained"
    if lora is not None:
        weights = f"LoRA in fp32 of rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, merged into the "
        weights += f"weights; the adapter alone is in `{ADAPTER}/`"
    return f"""{made}

- **Order seed: {run.order}**
- Text: {text}
- {training.epochs} {"epoch" if training.epochs == 1 else "epochs"} in batches of {training.batch_size}, {drawn}
- AdamW, learning rate {training.learning_rate:g} ({training.schedule} schedule, {training.warmup_steps} \
steps of warm-up), weight decay {training.weight_decay:g}
- {weights}
- Precision: {_PRECISION[training.precision]}, saved as {training.saved_as}
"""


def given_card(base: GivenBase, saved_as: Stored) -> str:
    """The card of a base that was given."""
    source = f"`{base.model}`, revision `{base.revision}`" if base.revision else f"`{base.model}`"
    return f"""The base model of an order study: {source}, not trained further.

- Saved as {saved_as}, as its sub-models are
"""


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
    plain = with_adapter_added(copied) if is_adapted(model) else copied
    return cast(PreTrainedModel, plain.to(dtype))
