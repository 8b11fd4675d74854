"""The merges of a study as mergekit recipes."""

from examples.order_study.model import SOUP_CANDIDATE, Model, inputs
from examples.order_study.settings import SAME_ORDER_AVERAGE, SHRUNK, SOUP, STRETCHED, Study

FIRST_WORDS = "of an order study"  # somewhere in the first line of every recipe that is ours

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def recipe(model: Model, study: Study) -> str:
    """The recipe of a merge: what mergekit reads, run in the study's folder."""
    # The ./ keeps mergekit from asking a hub about a path.
    merged, base = (
        [f"./{one.folder}" for one in inputs(model, study) if one.kind != "base"],
        f"./{Model('base').folder}",
    )
    ours = model.kind in ("selection", "resampling")
    lines = [
        f"# {_title(model)}",
        "#",
        f"# Needs:   pip install {'mergekit-select' if ours else 'mergekit'}",
        f"# Run:     mergekit-yaml {model.recipe} ./again   (in the folder of the study, the one above this)",
    ]
    if model.kind == "average" or model.control in (SOUP, SOUP_CANDIDATE, SAME_ORDER_AVERAGE):
        # No base_model: mergekit's linear would make it one of those averaged. Config and tokenizer then come
        # from any of the sub-models, which have the same.
        lines += ["merge_method: linear", *_weighted(merged, 1.0)]
    elif ours:
        resampling = model.kind == "resampling"
        note = "what the sub-models were fine-tuned from; never drawn" if resampling else "gives config and tokenizer"
        lines += [
            f"merge_method: parameter_selection{'_resampling' if resampling else ''}",
            f"base_model: {base} # {note}",
            "models:",
            *(f"  - model: {sub}" for sub in merged),
            "parameters:",
            f"  seed: {model.seed}",
            "  draws: 1",
        ]
        if model.rounds is not None:
            lines.append(f"  rounds: {model.rounds}")
    else:
        assert model.control is not None
        method, _, stretch = model.control.partition("-")
        if method in ("stretch", STRETCHED, SHRUNK):
            factor = float(stretch) if model.factor is None else model.factor
            lines += [
                "merge_method: task_arithmetic",
                f"base_model: {base}",
                *_weighted(merged, factor / len(merged)),
            ]
        else:
            lines += [f"merge_method: {method}", f"base_model: {base}", *_weighted(merged, 1.0)]
            lines += ["parameters:", "  density: 0.5", "  normalize: true"]
    lines.append(f"dtype: {_DTYPES[study.fine_tuning.saved_as]}")
    return "\n".join(lines) + "\n"


def _weighted(models: list[str], weight: float) -> list[str]:
    lines = ["models:"]
    for model in models:
        lines += [f"  - model: {model}", "    parameters:", f"      weight: {weight}"]
    return lines


def _title(model: Model) -> str:
    state = "" if model.step is None else f" after {model.step} steps of fine-tuning"
    subject = f"the sub-models {FIRST_WORDS}{state}"
    if model.kind == "average":
        return f"The average of {subject}."
    if model.kind == "selection":
        return f"Parameter selection from {subject}, seed {model.seed}."
    if model.kind == "control":
        return f"A control, {model.control}, of {subject}."
    times = "once" if model.rounds == 1 else f"up to {model.rounds} times"
    rounds = "until it differs from the base" if model.rounds is None else times
    return f"Parameter selection with resampling, {rounds}, from {subject}, seed {model.seed}."
