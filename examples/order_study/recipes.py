"""The merges of a study as mergekit recipes: which there are, and the text of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from order_study.settings import BASE, Study

MergeKind = Literal["average", "selection", "resampling"]

MODELS = "models"
MERGES = "merges"
RECIPES = "recipes"
STEPS = "steps"

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Merge:
    """One merge of all sub-models, the finished ones or their states after a step."""

    kind: MergeKind
    seed: int | None  # None for the average, which draws nothing
    rounds: int | None = None  # of resampling; None: until it differs
    step: int | None = None  # None: the finished sub-models

    @property
    def name(self) -> str:
        """Its folder, below the folder of all merges."""
        if self.step is not None:
            return f"{STEPS}/{self.step:06}/{self.kind}"
        rounds = "" if self.rounds is None else f"-{self.rounds}"
        return self.kind if self.seed is None else f"{self.kind}{rounds}-seed-{self.seed}"

    @property
    def folder(self) -> str:
        """Its folder, as seen from the study's."""
        return f"{MERGES}/{self.name}"

    @property
    def recipe(self) -> str:
        """The file of its recipe, as seen from the study's folder."""
        return f"{RECIPES}/{self.name.replace('/', '-')}.yml"


def plan(study: Study, steps: Sequence[int]) -> list[Merge]:
    """All merges of a study; of intermediate states (`steps`) one of each kind, with the first of the merge seeds."""
    merging = study.merging
    merges = [Merge("average", None)]
    merges += [Merge("selection", seed) for seed in merging.seeds]
    merges += [Merge("resampling", seed, rounds) for rounds in merging.rounds for seed in merging.seeds]
    first = merging.seeds[0]
    for step in steps:
        merges += [Merge("average", None, step=step), Merge("selection", first, step=step)]
        if merging.rounds:
            rounds = None if None in merging.rounds else merging.rounds[-1]
            merges.append(Merge("resampling", first, rounds, step))
    return merges


def inputs(merge: Merge, study: Study) -> list[str]:
    """The models that a merge reads, sub-models first, as seen from the study's folder."""
    place = MODELS if merge.step is None else f"{MODELS}/{STEPS}/{merge.step:06}"
    subs = [f"{place}/order-{order}" for order in study.orders]
    return subs if merge.kind == "average" else [*subs, f"{MODELS}/{BASE}"]


def recipe(merge: Merge, study: Study) -> str:
    """The recipe of a merge: what mergekit reads, run in the study's folder."""
    # The ./ keeps mergekit from asking a hub about a path.
    subs = [f"./{path}" for path in inputs(merge, study)[: len(study.orders)]]
    lines = [
        f"# {_title(merge)}",
        "#",
        f"# Needs:   pip install {'mergekit' if merge.kind == 'average' else 'mergekit-select'}",
        f"# Run:     mergekit-yaml {merge.recipe} ./again   (in the folder of the study, the one above this)",
    ]
    if merge.kind == "average":
        # No base_model: mergekit's linear would make it one of those averaged. Config and tokenizer then come
        # from any of the sub-models, which have the same.
        lines += ["merge_method: linear", "models:"]
        for sub in subs:
            lines += [f"  - model: {sub}", "    parameters:", "      weight: 1.0"]
    else:
        resampling = merge.kind == "resampling"
        note = "what the sub-models were fine-tuned from; never drawn" if resampling else "gives config and tokenizer"
        lines += [
            f"merge_method: parameter_selection{'_resampling' if resampling else ''}",
            f"base_model: ./{MODELS}/{BASE} # {note}",
            "models:",
            *(f"  - model: {sub}" for sub in subs),
            "parameters:",
            f"  seed: {merge.seed}",
            "  draws: 1",
        ]
        if merge.rounds is not None:
            lines.append(f"  rounds: {merge.rounds}")
    lines.append(f"dtype: {_DTYPES[study.fine_tuning.saved_as]}")
    return "\n".join(lines) + "\n"


def _title(merge: Merge) -> str:
    state = "" if merge.step is None else f" after {merge.step} steps of fine-tuning"
    subject = f"the sub-models of an order study{state}"
    if merge.kind == "average":
        return f"The average of {subject}."
    if merge.kind == "selection":
        return f"Parameter selection from {subject}, seed {merge.seed}."
    times = "once" if merge.rounds == 1 else f"up to {merge.rounds} times"
    rounds = "until it differs from the base" if merge.rounds is None else times
    return f"Parameter selection with resampling, {rounds}, from {subject}, seed {merge.seed}."
