"""A table of models: held-out loss, and the share of parameters that equal the base's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from order_study.errors import StudyError
from order_study.evaluation import HeldOut, held_out_loss
from order_study.parts import read_part
from order_study.weights import share_equal


@dataclass(frozen=True)
class Row:
    """What the table says of one model."""

    name: str
    held_out: HeldOut
    equal_to_base: float | None  # None for the base itself


def compare(models: Mapping[str, Path], text: Path) -> list[Row]:
    """Measure each model on the held-out part in `text`, and its weights against those of the first model.

    Raises:
        StudyError: A model cannot be read, or sees the text as other tokens than the first, so that loss per
            token would not be comparable.
    """
    passages = read_part(text, "held_out")
    base_name, base = next(iter(models.items()))
    base_samples = None
    rows = []
    for name, folder in tqdm(models.items(), desc="measuring", unit="model", leave=False, disable=None):
        held_out, samples = held_out_loss(folder, passages)
        base_samples = base_samples or samples
        if samples != base_samples:
            raise StudyError(
                f"loss per token is comparable over the same tokens only, but {name} ({folder}) splits the "
                f"text otherwise than {base_name} ({base}): compare models that share a tokenizer"
            )
        rows.append(Row(name, held_out, None if name == base_name else share_equal(folder, base)))
    return rows


def table(rows: list[Row]) -> str:
    """Lay out rows as aligned text."""
    width = max(len("model"), *(len(row.name) for row in rows))
    equal_to = f"equal to {rows[0].name}"
    lines = [
        f"held-out loss in nats per token, over {rows[0].held_out.tokens:,} tokens",
        "",
        f"{'model':<{width}}  {'loss':>7}  {'perplexity':>10}  {equal_to}",
    ]
    for row in rows:
        loss, perplexity = row.held_out.loss, row.held_out.perplexity
        equal = "" if row.equal_to_base is None else f"{row.equal_to_base:.2%}"
        line = f"{row.name:<{width}}  {loss:>7.4f}  {perplexity:>10.3f}  {equal:>{len(equal_to)}}"
        lines.append(line.rstrip())
    return "\n".join(lines)
