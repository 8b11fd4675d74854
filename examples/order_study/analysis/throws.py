"""Several throws of a study beside each other: what holds for each of them, and how far throws differ."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import stats

from examples.order_study.analysis.comparisons import BEST, Difference, Measure, Row
from examples.order_study.analysis.markdown import percent, signed, table
from examples.order_study.analysis.results import Results
from examples.order_study.sources import Frozen


class ThrownRow(Frozen):
    """One way of making a model, in each throw."""

    label: str
    losses: tuple[float, ...]  # held-out, in nats per token
    exact_match: tuple[float, ...] | None  # share of right answers


class ThrownDifference(Frozen):
    """One row less another, in each throw."""

    measure: Measure
    row: str
    against: str
    each: tuple[Difference, ...]  # with intervals over samples
    mean: float
    low: float  # of the interval over throws, from Student's t with one degree of freedom less than there are throws
    high: float


class Throws(Frozen):
    """The contents of the results.json over all throws."""

    schema_version: Literal[1] = 1
    orders: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    confidence: float
    table: tuple[ThrownRow, ...]
    differences: tuple[ThrownDifference, ...]


def compare(throws: Sequence[Results]) -> Throws:
    """Set throws of one study beside each other; rows are those that all have."""
    confidence = throws[0].study.measuring.confidence
    rows = [{_label(row.label): row for row in one.table} for one in throws]
    pairs = [{_pair(difference): difference for difference in one.differences} for one in throws]
    return Throws(
        orders=tuple(one.study.orders for one in throws),
        seeds=tuple(one.study.fine_tuning.seed for one in throws),
        confidence=confidence,
        table=tuple(_row(label, [some[label] for some in rows]) for label in rows[0] if all(label in r for r in rows)),
        differences=tuple(
            _difference(key, [some[key] for some in pairs], confidence)
            for key in pairs[0]
            if all(key in some for some in pairs)
        ),
    )


def render(throws: Throws) -> str:
    """Lay out the comparison in Markdown."""
    number = len(throws.orders)
    names = [f"throw {place}" for place in range(1, number + 1)]
    answers = throws.table[0].exact_match is not None
    sets = "; ".join(
        f"{name}: orders {', '.join(map(str, orders))}, training seed {seed}"
        for name, orders, seed in zip(names, throws.orders, throws.seeds, strict=True)
    )
    rows = [
        [
            row.label,
            *(f"{loss:.4f}" for loss in row.losses),
            f"{np.mean(row.losses):.4f}",
            *(percent(share) for share in row.exact_match or ()),
            *([percent(float(np.mean(row.exact_match)))] if row.exact_match else []),
        ]
        for row in throws.table
    ]
    columns = [*names, "mean"]
    head = ["model", *(f"loss, {name}" for name in columns), *([f"right, {name}" for name in columns] * answers)]
    units = {"loss": "loss", "exact_match": "exact match"}
    compared = []
    for one in throws.differences:
        share = one.measure == "exact_match"
        each = [f"{signed(d.estimate, share)} ({signed(d.low, share)} to {signed(d.high, share)})" for d in one.each]
        over = f"{signed(one.mean, share)} ({signed(one.low, share)} to {signed(one.high, share)})"
        compared.append([units[one.measure], one.row, one.against, *each, over])
    level = f"{throws.confidence:.0%}"
    return (
        f"# Order study: {number} throws\n\nThe same study with other orders and training seeds. {sets}.\n\n"
        "## Held-out loss\n\nIn nats per token.\n\n"
        + table(head, rows, "l" + "r" * (len(head) - 1))
        + f"\n\n## Differences\n\nRow less the row it is set against. Of each throw, the {level} interval is one over "
        f"samples. That over throws is a t-interval from {number} numbers: it says what to expect of other orders, and "
        "with few throws it is wide.\n\n"
        + table(["of", "row", "against", *names, "over throws"], compared, "lll" + "r" * (number + 1))
        + "\n"
    )


def _label(label: str) -> str:
    """The label of a row without the name of the sub-model that is the best."""
    return BEST if label.startswith(BEST) else label


def _pair(difference: Difference) -> tuple[Measure, str, str]:
    return difference.measure, _label(difference.row), _label(difference.against)


def _row(label: str, rows: Sequence[Row]) -> ThrownRow:
    answers = [row.exact_match for row in rows if row.exact_match is not None]
    return ThrownRow(
        label=label,
        losses=tuple(row.loss for row in rows),
        exact_match=tuple(answers) if len(answers) == len(rows) else None,
    )


def _difference(key: tuple[Measure, str, str], each: Sequence[Difference], confidence: float) -> ThrownDifference:
    estimates = np.array([one.estimate for one in each])
    mean = float(estimates.mean())
    error = float(estimates.std(ddof=1)) / np.sqrt(len(estimates))
    half = error * float(stats.t.ppf((1 + confidence) / 2, len(estimates) - 1))
    measure, row, against = key
    return ThrownDifference(
        measure=measure, row=row, against=against, each=tuple(each), mean=mean, low=mean - half, high=mean + half
    )
