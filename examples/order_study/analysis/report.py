"""The results as Markdown: what was trained, tables, and in plain words what they support."""

from collections.abc import Sequence
from pathlib import PurePath

from examples.order_study.analysis.comparisons import Difference
from examples.order_study.analysis.describe import settings_rows
from examples.order_study.analysis.imbalance import RATE, Trend
from examples.order_study.analysis.markdown import percent, probability, signed, table
from examples.order_study.analysis.results import Results
from examples.order_study.analysis.slopes import Slope

_EPOCH = {"first": "first epoch", "last": "last epoch"}
_CAPTIONS = {
    "position-first-epoch": "Training loss over position in the first epoch, as it is and within samples",
    "position-last-epoch": "Training loss over position in the last epoch, as it is and within samples",
    "anchor": "The same samples under the anchor, the other sub-models and the merges",
    "steps": "Held-out loss along the training",
}


def render(results: Results, figures: Sequence[str] = ()) -> str:
    """Lay out the results; `figures` are paths of pictures, relative to the report."""
    sections = [_trained(results), _held_out(results), _compared(results), _position(results), _causes(results)]
    sections.append(_anchor(results))
    if figures:
        links = [f"![{_CAPTIONS.get(PurePath(path).stem, PurePath(path).stem)}]({path})" for path in figures]
        sections.append("## Figures\n\n" + "\n\n".join(links))
    return "# Order study\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _trained(results: Results) -> str:
    return (
        "## What was trained\n\nThe sub-models differ in the order of the training data and in nothing else. All "
        "settings are in `results.json`.\n\n"
        + table(("what", "how"), settings_rows(results.study, results.counts, results.steps), "ll")
    )


def _held_out(results: Results) -> str:
    answers = results.exact_match_samples is not None
    distances = any(row.distance is not None for row in results.table)
    head = [
        "model",
        "models",
        "loss",
        "spread",
        "range",
        "perplexity",
        *["exact match"] * answers,
        "equal to base",
        *(["distance"] * distances),
    ]
    rows = []
    for row in results.table:
        rows.append(
            [
                row.label,
                str(len(row.models)),
                f"{row.loss:.4f}",
                "" if row.loss_deviation is None else f"{row.loss_deviation:.4f}",
                "" if row.loss_deviation is None else f"{row.loss_least:.4f} to {row.loss_greatest:.4f}",
                f"{row.perplexity:.3f}",
                *[percent(row.exact_match, row.exact_match_deviation)] * answers,
                "" if row.equal_to_base is None else f"{row.equal_to_base:.2%}",
                *(["" if row.distance is None else f"{row.distance:.3f}"] * distances),
            ]
        )
    singles = [
        [
            model["name"],
            f"{model['loss']:.4f}",
            *[percent(model["exact_match"])] * answers,
            percent(model["equal_to_base"]),
        ]
        for model in results.models
        if model["kind"] == "sub-model" and model["step"] is None
    ]
    own_head = ["sub-model", "loss", *["exact match"] * answers, "equal to base"]
    return (
        f"## Held-out loss\n\nIn nats per token, over {results.held_out_tokens:,} response tokens of "
        f"{results.held_out_samples:,} samples"
        + (f"; exact match on {results.exact_match_samples:,} of them" if answers else "")
        + ". A row is the mean over order seeds or merge seeds; spread is the standard deviation over them. "
        "Resampling can only act where parameters equal the base's."
        + " Distance is that from the base, the Euclidean norm over all parameters." * distances
        + "\n\n"
        + table(head, rows, "lrrrlr" + "r" * answers + "r" + "r" * distances)
        + f"\n\n{_chosen(results)}\n\n"
        + table(own_head, singles, "lr" + "r" * answers + "r")
    )


def _chosen(results: Results) -> str:
    if results.study.has_validation():
        return "The best sub-model is chosen by its loss on the samples for validation."
    return "The best sub-model is chosen by its loss on the very samples it is measured on, so its row flatters it."


def _nor(results: Results) -> str:
    return "" if results.study.has_validation() else ", nor, for the best sub-model, on its having been chosen here"


def _compared(results: Results) -> str:
    if not results.differences:
        return ""
    measuring, many = results.study.measuring, len(results.differences)
    told = sum(difference.told for difference in results.differences)
    units = {"loss": "loss, nats per token", "exact_match": "exact match"}
    rows = []
    for d in results.differences:
        share = d.measure == "exact_match"
        estimate, low, high = (signed(value, share) for value in (d.estimate, d.low, d.high))
        rows.append((units[d.measure], d.row, d.against, estimate, f"{low} to {high}", probability(d.p), _verdict(d)))
    head = ("of", "row", "against", "difference", f"{measuring.confidence:.0%} interval", "p", "in words")
    return (
        "## Differences\n\nRow less the row it is set against; below 0, the first has the lower loss. Paired bootstrap "
        f"intervals over the held-out samples ({measuring.bootstrap:,} resamples). They say how far a difference "
        "depends on the samples drawn; not how far on the order and merge seeds, of which there are few"
        f"{_nor(results)}. {many} comparisons are made, and {told} of the intervals exclude 0; were there no "
        f"difference anywhere, about {many * (1 - measuring.confidence):.1f} would by chance.\n\n"
        + table(head, rows, "lllrrrl")
    )


def _position(results: Results) -> str:
    if not results.trends:
        return ""
    rows = []
    for trend in results.trends:
        name = _EPOCH[trend.epoch]
        rows += [[name, order.order, *_slope(order.slope)] for order in trend.orders]
        rows += [[name, "all orders", *_slope(trend.raw)], [name, "within samples", *_slope(trend.within)]]
    head = (
        "position in the",
        "loss of",
        "slope",
        f"{results.study.measuring.confidence:.0%} interval",
        "p",
        "clusters",
    )
    return (
        f"## Position in the epoch\n\nLoss of the sub-models on {results.training_samples or 0:,} fine-tuning "
        "samples over the position at which they were seen: 0 is the first batch of an epoch, 1 the last, so slopes "
        "are in nats per token over the length of an epoch. Samples differ in difficulty far more than position "
        "changes them; within samples, each is compared with itself under the other orders. Standard errors allow for "
        "what a sample has in common with itself under other orders, and with the samples of its batches.\n\n"
        + table(head, rows, "llrrrr")
        + "\n\n"
        + "\n\n".join(_trend_in_words(trend) for trend in results.trends)
    )


def _causes(results: Results) -> str:
    if not results.causes:
        return ""
    rows = [(cause.what, *_slope(cause.alone)[:3], *_slope(cause.together)[:3]) for cause in results.causes]
    level = f"{results.study.measuring.confidence:.0%} interval"
    head = ("of training loss on", "alone", level, "p", "together", level, "p")
    over = "over the length of an epoch"
    if any(cause.what == RATE for cause in results.causes):
        over += ", and over the sum of the learning rates at which a sample was seen, in units of the highest one"
    else:
        over += "; every sample was seen at the same learning rates"
    return (
        f"## Position or learning rate\n\nSlopes within samples, in nats per token: {over}. Together: in one "
        "regression, so that each slope says what its cause adds to the others.\n\n" + table(head, rows, "lrrrrrr")
    )


def _anchor(results: Results) -> str:
    if results.anchor is None:
        return ""
    rows = [(curve.label, *_slope(curve.slope)) for curve in results.anchor.curves if curve.difference is not None]
    orders = len(results.study.orders)
    head = ("model", "slope", f"{results.study.measuring.confidence:.0%} interval", "p", "clusters")
    return (
        "## The same samples under other models\n\nTraining loss less the mean of the sub-models other than the "
        f"anchor, {results.anchor.order}, over position in the first epoch of the anchor. The slope of a "
        "merge shows how much of the anchor's order is left in it; the mean of the losses of all "
        f"{orders} sub-models, the anchor included, would have 1/{orders} of the anchor's slope.\n\n"
        + table(head, rows, "lrrrr")
    )


def _trend_in_words(trend: Trend) -> str:
    where, slope = _EPOCH[trend.epoch], trend.within
    if slope is None:
        return f"Position in the {where}: no trend can be told, as there are too few batches to tell one from."
    numbers = (
        f"{slope.estimate:+.4f} nats per token ({slope.low:+.4f} to {slope.high:+.4f}, p {probability(slope.p, '= ')})"
    )
    if slope.low <= 0 <= slope.high:
        return f"Position in the {where}: no trend can be told within samples; {numbers}, and the interval contains 0."
    seen = "early" if slope.estimate < 0 else "late"
    return f"Position in the {where}: samples seen {seen} in it end up with the higher loss; within samples {numbers}."


def _verdict(difference: Difference) -> str:
    if not difference.told:
        return "no difference can be told"
    better = (difference.estimate < 0) == (difference.measure == "loss")
    return "better" if better else "worse"


def _slope(slope: Slope | None) -> list[str]:
    if slope is None:
        return ["cannot be told", "", "", ""]
    return [
        f"{slope.estimate:+.4f}",
        f"{slope.low:+.4f} to {slope.high:+.4f}",
        probability(slope.p),
        str(slope.freedom + 1),
    ]
