"""Check the merges of a recipe file, each after those whose outputs it needs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_select import kinds
from mergekit_select.check.cost import add_cost
from mergekit_select.check.merge import MergeUnderCheck
from mergekit_select.check.models import check_donor, check_models, check_templates, check_tokenizers
from mergekit_select.check.opening import open_models
from mergekit_select.check.output import check_out, described_output
from mergekit_select.check.parameters import check_filters
from mergekit_select.check.recipe import check_recipe
from mergekit_select.check.structure import plan_merge
from mergekit_select.check.tensors import TensorCheck
from mergekit_select.check.vocabulary import check_alignment, check_vocabulary
from mergekit_select.findings import Cost, Findings, Report
from mergekit_select.inputs.checkpoint import Checkpoint
from mergekit_select.inputs.recipe import read_recipes
from mergekit_select.inputs.references import references


def check(
    recipe: str | Path,
    out: str | Path | None = None,
    options: MergeOptions | None = None,
    progress: Callable[[str], None] = lambda _name: None,
) -> Report:
    """Say whether a recipe would merge, what is wrong with it, and what the merge will take.

    Reads config.json, tokenizer files, recipes that merges left, headers and indexes; of hub models the same through
    metadata calls. mergekit plans with the descriptions read here. A merge in another thread of this process waits
    until they are planned.

    Args:
        recipe: A mergekit recipe, or a mergekit-multi file.
        out: Where the merge is to be written, if known.
        options: mergekit's options for the merge.
        progress: Called with each model's name before it is looked at.

    Raises:
        RecipeError: The recipe file cannot be read as one.
    """
    recipes = read_recipes(recipe)
    findings, costs = Findings(), list[Cost]()
    names = [one.name for one in recipes]
    if len(set(names)) < len(names):
        findings.add(kinds.MERGE_NAMES_REPEAT, "name", ", ".join(map(str, names)))
        return Report(str(recipe), None if out is None else str(out), tuple(findings), ())
    parsed: dict[str | None, MergeUnderCheck] = {}
    for one in recipes:
        merge = check_recipe(one, options or MergeOptions(), findings)
        if merge is not None:
            parsed[one.name] = merge
    outputs: dict[str, Checkpoint | None] = {name: None for name in names if name is not None}
    with tempfile.TemporaryDirectory(prefix="mergekit-select-") as scratch:
        for name in _in_order(parsed, findings):
            merge = parsed[name]
            output = _check(merge, None if out is None else str(out), outputs, Path(scratch), progress)
            if name is not None:
                outputs[name] = output
            findings += merge.placed_findings()
            if merge.cost is not None:
                costs.append(merge.cost)
    return Report(str(recipe), None if out is None else str(out), tuple(findings), tuple(costs))


def _in_order(merges: Mapping[str | None, MergeUnderCheck], findings: Findings) -> Sequence[str | None]:
    """Return the merges' names, each after those that it needs; as in the file where they need each other."""
    needs = {
        name: [one.model.path for _, one in references(merge.config) if one.model.path in merges]
        for name, merge in merges.items()
    }
    try:
        return list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        circle = error.args[1][::-1]
        findings.add(kinds.MERGES_CIRCULAR, f"{circle[0]}: models", " needs ".join(map(str, circle)))
        return list(merges)


def _check(
    merge: MergeUnderCheck,
    out: str | None,
    outputs: Mapping[str, Checkpoint | None],
    scratch: Path,
    progress: Callable[[str], None],
) -> Checkpoint | None:
    """Check one merge; return its output's description, for the merges of the same file that need it."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    if not open_models(merge, folder, outputs, progress):
        return None
    check_models(merge)
    check_donor(merge)
    check_templates(merge)
    plan = plan_merge(merge)
    if plan is None:
        return None
    names = [*(planned.name for planned in plan.tensors), *(name for name, _ in plan.failures)]
    check_filters(merge.config, names, merge.findings)
    rows = check_alignment(merge, plan)
    tensors = TensorCheck(merge, plan, rows)
    written = tensors.run()
    if rows is None:
        check_vocabulary(merge, plan, written)
    if merge.config.tokenizer is None and merge.config.tokenizer_source is None:
        check_tokenizers(merge, plan)
    # Named merges go to mergekit-multi's folder for intermediates, which is not known here.
    out = out if merge.name is None else None
    add_cost(merge, written, tensors.unknown, out)
    if out is not None:
        check_out(merge, out, written)
    if merge.name is None or not written or tensors.unknown or merge.has_errors():
        return None
    return described_output(merge, plan, written, folder / "output")
