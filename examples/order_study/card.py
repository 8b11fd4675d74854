"""The model card of a checkpoint."""

from order_study.settings import Run, Training


def trained_card(run: Run, step: int | None, text: str) -> str:
    """The card of a model that was trained, or of its state after `step` steps; `text` names what it was trained on."""
    training = run.training
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
    return _card(
        run.name,
        f"""{made}

- **Order seed: {run.order}**
- Text: {text}
- {training.epochs} {"epoch" if training.epochs == 1 else "epochs"} in batches of {training.batch_size}, {drawn}
- AdamW, learning rate {training.learning_rate:g} ({training.schedule} schedule, {training.warmup_steps} \
steps of warm-up), weight decay {training.weight_decay:g}
- {_weights(training)}
- Precision: {_PRECISION[training.precision]}, saved as {training.saved_as}
""",
    )


def given_card(model: str, revision: str | None, saved_as: str) -> str:
    """The card of a base that was given."""
    source = f"`{model}`, revision `{revision}`" if revision else f"`{model}`"
    return _card(
        "base",
        f"""The base model of an order study: {source}, not trained further.

- Saved as {saved_as}, as its sub-models are
""",
    )


_PRECISION = {
    "fp32": "weights and arithmetic in fp32",
    "bf16_mixed": "weights in fp32, arithmetic in bf16 (autocast)",
    "bf16": "weights and arithmetic in bf16",
}


def _weights(training: Training) -> str:
    if training.lora is None:
        return "All weights trained"
    lora = training.lora
    return (
        f"LoRA in fp32 of rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, merged into the weights; "
        "the adapter alone is in `adapter/`"
    )


def _card(name: str, content: str) -> str:
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

{content}
All settings are in `training.json`.
"""
