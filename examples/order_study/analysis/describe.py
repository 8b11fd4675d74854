"""The settings of a study in words."""

from collections.abc import Mapping

from examples.order_study.measured import PartCount
from examples.order_study.settings import GivenBase, Study
from examples.order_study.sources import HubDataset, JsonLines


def settings_rows(study: Study, counts: Mapping[str, PartCount], steps: int) -> list[tuple[str, str]]:
    """What was trained and how: pairs of a name and a description."""
    tuning = study.fine_tuning
    kind = "all weights" if tuning.lora is None else f"LoRA of rank {tuning.lora.rank}, merged into the weights"
    return [
        ("data", _data(study)),
        *((f"{part.replace('_', '-')} part", _count(count)) for part, count in counts.items()),
        ("base", _base(study)),
        (
            "fine-tuning",
            f"{kind}; {tuning.epochs} epochs in batches of {tuning.batch_size}, {steps} steps; learning rate "
            f"{tuning.learning_rate:g}, {tuning.schedule} schedule, {tuning.warmup_steps} steps of warm-up; "
            f"weight decay {tuning.weight_decay:g}",
        ),
        ("precision", f"trained in {tuning.precision}, saved as {tuning.saved_as}"),
        ("order seeds", ", ".join(map(str, study.orders))),
        ("batches", "redrawn with the order" if study.composition == "redrawn" else "of fixed composition"),
        ("merge seeds", ", ".join(map(str, study.merging.seeds))),
    ]


def _data(study: Study) -> str:
    data = study.data
    if isinstance(data, JsonLines):
        return f"JSON lines, `{data.train}`" + (f" and `{data.held_out}`" if data.held_out else "")
    if isinstance(data, HubDataset):
        return (
            f"`{data.id}`" + (f", {data.name}" if data.name else "") + f" at {data.revision or 'its newest revision'}"
        )
    return f"`{data.source}`, which every CPython carries"


def _base(study: Study) -> str:
    if isinstance(study.base, GivenBase):
        return f"`{study.base.model}`" + (f" at {study.base.revision}" if study.base.revision else "")
    shape, training = study.base.architecture, study.base.training
    return (
        f"Llama of {shape.num_hidden_layers} layers, hidden size {shape.hidden_size}, vocabulary {shape.vocab_size}, "
        f"trained from fresh weights for {training.epochs} epochs at learning rate {training.learning_rate:g}"
    )


def _count(count: PartCount) -> str:
    left_out = f"; {count.left_out:,} left out because longer than the context" if count.left_out else ""
    return f"{count.samples:,} samples{left_out}"
