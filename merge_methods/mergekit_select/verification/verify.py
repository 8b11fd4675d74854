"""Derive every tensor of an output again from its recipe, and compare."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_select import kinds
from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.findings import Finding, Findings, finding
from mergekit_select.inputs.files import RECIPE, state
from mergekit_select.inputs.leftovers import leftovers
from mergekit_select.inputs.recipe import read_recipe
from mergekit_select.inputs.references import donor, references, relocated
from mergekit_select.planner.determinism import Determinism, determinism
from mergekit_select.planner.engine import Engine
from mergekit_select.planner.opening import opened, with_adapter_cache
from mergekit_select.planner.plan import PlannedTensor
from mergekit_select.planner.together import Progress, each
from mergekit_select.planner.vocabulary import tokenizer_source
from mergekit_select.verification.companions import companion_problems
from mergekit_select.verification.comparison import Compared, Comparison, Difference, compared
from mergekit_select.verification.config import config_problems
from mergekit_select.verification.output import Output, open_output


@dataclass(frozen=True)
class Verification:
    """The answer.

    Attributes:
        output: The folder.
        recipe: The file that the tensors were derived from; None if there is none.
        method: The recipe's method.
        determinism: Whether that method gives the same bits again.
        tensors: How many tensors were compared.
        parameters: How many elements these have.
        problems: Why the output is unfinished, or disagrees with itself.
        differences: The tensors that are not what the recipe says.
        notes: What else the reader should know.
        undecided: Whether all that differs are bits that may differ between two runs of the same recipe.
    """

    output: Path
    recipe: Path | None
    method: str | None
    determinism: Determinism | None
    tensors: int
    parameters: int
    problems: tuple[Finding, ...]
    differences: tuple[Difference, ...]
    notes: tuple[Finding, ...]
    undecided: bool = False

    @property
    def same(self) -> bool:
        """Whether the output is finished and every bit is what the recipe says."""
        return not self.problems and not self.differences


def verify(
    output: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | None = None,
    *,
    locations: Mapping[str, str] | None = None,
    options: MergeOptions | None = None,
    jobs: int = 1,
    progress: Progress = lambda tensors: tensors,
) -> Verification:
    """Derive every tensor of an output again from its recipe, and compare bits, names, shapes and dtypes.

    One tensor and its inputs are in each process's memory at a time. Nothing is written, except what mergekit itself
    downloads and caches.

    Args:
        output: The folder that a merge was written to.
        recipe: Instead of the ``mergekit_config.yml`` in that folder.
        locations: Where models of the recipe lie now; see ``inputs.references.relocated``.
        options: As for the merge.
        jobs: How many processes derive tensors.
        progress: Wraps the tensors as they are gone through.

    Raises:
        UnreadableError: The output, the recipe or a model cannot be read.
        PlanError: mergekit refuses the merge.
        MergekitSelectError: A parameter breaks its rule.
    """
    before = _states(output)
    found = open_output(output)
    path = Path(recipe) if recipe is not None else found.folder / RECIPE
    if recipe is None and not path.exists():
        problems = (*found.problems, finding(kinds.RECIPE_MISSING, RECIPE))
        return Verification(found.folder, None, None, None, 0, 0, problems, (), ())
    config = read_recipe(path)
    origins = _origins(config)
    if locations:
        config = relocated(config, locations)
        origins |= _origins(config)
    for _, reference in references(config):
        if os.path.isdir(reference.model.path) and os.path.samefile(reference.model.path, found.folder):
            raise UnreadableError(
                f"the recipe names the output itself as a model, {reference}: it cannot be derived from itself; "
                f"give --map where that model lies now"
            )
        for part in (reference.model, reference.lora):
            before |= {} if part is None else _states(part.path)
    comparison = Comparison(found)
    union = tokenizer_source(config) == "union"
    with (
        tempfile.TemporaryDirectory(prefix="mergekit-select-") as scratch,
        with_adapter_cache(options) as complete,
        opened(config, complete) as engine,
    ):
        answer = partial(_compared, output=found)
        for planned, result in each(engine, config, complete, answer, jobs=jobs, progress=progress):
            comparison.add(planned.name, result)
        comparison.finish()
        along_vocabulary = {t.name for t in engine.tensors if t.weight.vocabulary_axis is not None}
        configs = engine.possible_configs()
        companions = dict(engine.possible_companions(Path(scratch)))
        aligned = engine.plan.tokenizer is not None
        # Without a base model mergekit takes all of these from one arbitrary model, not each from another.
        in_config, beside = min(
            (
                (
                    config_problems(found.folder / "config.json", expected, origins),
                    companion_problems(found.folder, folder, aligned, union),
                )
                for expected, folder in zip(configs, companions, strict=True)
            ),
            key=lambda problems: sum(map(len, problems)),
        )
        for file, state_before in before.items():
            if state(file) != state_before:
                raise UnreadableError(f"{file} has changed while it was verified; verify again")
    problems = (*found.problems, *in_config, *comparison.problems, *beside)
    kind = determinism(config.merge_method)
    differing = {difference.tensor for difference in comparison.differences}
    reordered = union and (not differing.isdisjoint(along_vocabulary) or bool(beside))
    undecided = (
        bool(differing or problems)
        and all(problem.kind == "random" for problem in problems)
        and all(difference.kind == "bits" for difference in comparison.differences)
        and (kind is Determinism.RANDOM or (reordered and differing <= along_vocabulary))
    )
    notes = _notes(config.merge_method, kind, bool(differing), reordered)
    for left in leftovers(found.folder):
        notes.add(kinds.LEFTOVER, left.name)
    for failure in companions.values():
        if failure is not None:
            notes.add(kinds.NO_TOKENIZER, "tokenizer", problem=one_line(failure))
    return Verification(
        output=found.folder,
        recipe=path,
        method=config.merge_method,
        determinism=kind,
        tensors=comparison.tensors,
        parameters=comparison.parameters,
        problems=problems,
        differences=tuple(comparison.differences),
        notes=tuple(notes),
        undecided=undecided,
    )


def _compared(engine: Engine, planned: PlannedTensor, *, output: Output) -> Compared | None:
    return compared(output, planned.name, engine.merged(planned))


def _origins(config: MergeConfiguration) -> set[str]:
    """Return where the models lie of which the output may take its config, as the recipe says."""
    known = donor(config)
    return {model.model.path for model in ([known] if known else config.referenced_models())}


def _states(folder: str | os.PathLike[str]) -> dict[Path, list[int]]:
    """Return the states of a local folder's files; nothing of a model on a hub, whose files have digests for names."""
    try:
        return {path: state(path) for path in Path(folder).iterdir() if path.is_file()}
    except OSError:  # whoever reads it says why
        return {}


def _notes(method: str, kind: Determinism, differs: bool, reordered: bool) -> Findings:
    notes = Findings()
    if kind is Determinism.RANDOM:
        notes.add(kinds.METHOD_RANDOM, "merge_method", method=method)
    if kind is Determinism.UNKNOWN:
        notes.add(kinds.METHOD_NOT_KNOWN, "merge_method", method=method)
    if kind is Determinism.ARITHMETIC and differs:
        notes.add(kinds.METHOD_ROUNDS, "merge_method", method=method)
    if reordered:
        notes.add(kinds.UNION_REORDERED, "tokenizer.source")
    return notes
