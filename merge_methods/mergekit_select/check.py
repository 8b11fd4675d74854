"""Would this merge work? Asked of the recipe, the models' configs, tokenizers and headers, before a tensor is read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import _model_out_config
from mergekit.merge_methods import MergeMethod
from mergekit.options import MergeOptions

from mergekit_select.check_models import check_donor, check_models, check_tokenizers
from mergekit_select.check_output import check_out, check_room, check_vocabulary, cost_of, shard_count
from mergekit_select.check_recipe import check_recipe
from mergekit_select.check_tensors import Output, TensorCheck
from mergekit_select.checkpoints import TOKENIZER_FILES, Checkpoint, read_json
from mergekit_select.findings import Cost, Findings, Report
from mergekit_select.models import Model, ModelOpener, references, with_stand_ins
from mergekit_select.planning import Plan, plan_merge
from mergekit_select.recipes import Recipe, read_recipes
from mergekit_select.vocabulary import aligned_rows

_OWN_BUFFERS = 64 << 20  # what selection and resampling take at most beside inputs and result


def check(
    recipe: str | Path,
    out: str | Path | None = None,
    options: MergeOptions | None = None,
    progress: Callable[[str], None] = lambda _name: None,
) -> Report:
    """Say whether a recipe would merge, what is wrong with it, and what the merge will take.

    Reads config.json, tokenizer files, and the headers and indexes of checkpoints; of hub models the same through
    metadata calls. mergekit plans with the descriptions read here. Not for several threads at once with a merge:
    mergekit's cache of open models is global.

    Args:
        recipe: A mergekit recipe, or a mergekit-multi file.
        out: Where the merge is to be written, if known.
        options: mergekit's options for the merge.
        progress: Called with each model's name before it is looked at.

    Raises:
        RecipeError: The recipe file cannot be read as one.
    """
    recipes = read_recipes(recipe)
    with tempfile.TemporaryDirectory(prefix="mergekit-select-") as scratch:
        checker = _Checker(None if out is None else str(out), options or MergeOptions(), Path(scratch), progress)
        checker.check_all(recipes)
    return Report(str(recipe), None if out is None else str(out), tuple(checker.findings), tuple(checker.costs))


class _Checker:
    def __init__(self, out: str | None, options: MergeOptions, scratch: Path, progress: Callable[[str], None]) -> None:
        self.out = out
        self.options = options
        self.scratch = scratch
        self.progress = progress
        self.findings = Findings()
        self.costs: list[Cost] = []

    def check_all(self, recipes: list[Recipe]) -> None:
        names = [recipe.name for recipe in recipes]
        if len(set(names)) < len(names):
            self.findings.error(
                "recipe-invalid",
                "name",
                ", ".join(str(name) for name in names),
                "the merges of one file must have different names, one of them at most none",
                "rename one",
            )
            return
        parsed: dict[str | None, tuple[Recipe, MergeConfiguration, MergeMethod]] = {}
        for recipe in recipes:
            findings = Findings()
            for key in recipe.duplicates:
                message = "a key must stand once in a mapping; YAML keeps the last one without a word"
                findings.error("duplicate-key", key, "", message, "remove one, or join what they hold")
            result = check_recipe(recipe.raw, findings)
            self._keep(recipe, findings)
            if result is not None:
                parsed[recipe.name] = (recipe, *result)
        outputs: dict[str, Checkpoint | None] = {name: None for name in names if name is not None}
        for name in self._order(parsed, outputs):
            recipe, config, method = parsed[name]
            findings = Findings()
            output = self._check(recipe, config, method, outputs, findings)
            if name is not None:
                outputs[name] = output
            self._keep(recipe, findings)

    def _keep(self, recipe: Recipe, findings: Findings) -> None:
        self.findings += [f if recipe.name is None else f.within(recipe.name) for f in findings]

    def _order(
        self,
        parsed: Mapping[str | None, tuple[Recipe, MergeConfiguration, MergeMethod]],
        outputs: Mapping[str, Checkpoint | None],
    ) -> list[str | None]:
        """Merges after those that they need, as mergekit-multi runs them."""
        ordered: list[str | None] = []
        open_: list[str | None] = []

        def visit(name: str | None) -> None:
            if name in ordered or name not in parsed:
                return
            if name in open_:
                circle = " needs ".join(str(n) for n in [*open_[open_.index(name) :], name])
                message = "merges must not need each other in a circle"
                self.findings.error("recipe-invalid", f"{name}: models", circle, message, "break the circle")
                return
            open_.append(name)
            for _, reference in references(parsed[name][1]):
                if reference.model.path in outputs:
                    visit(reference.model.path)
            open_.pop()
            ordered.append(name)

        for name in parsed:
            visit(name)
        return ordered

    def _check(
        self,
        recipe: Recipe,
        config: MergeConfiguration,
        method: MergeMethod,
        outputs: Mapping[str, Checkpoint | None],
        findings: Findings,
    ) -> Checkpoint | None:
        scratch = Path(tempfile.mkdtemp(dir=self.scratch))
        opener = ModelOpener(self.options, scratch, outputs)
        models = opener.open_all(config, findings, self.progress)
        if models is None:
            return None
        merged = [model for reference, model in models.items() if reference in set(config.referenced_models())]
        check_models(config, merged, findings)
        check_donor(config, merged, findings)
        plan = plan_merge(config, self.options, models, findings)
        if plan is None:
            return None
        rows = aligned_rows(config, self.options, models, plan, findings)
        tensors = TensorCheck(config, method, plan, rows, self.options.unsafe_truncate_embeddings, findings)
        written = tensors.run(merged)
        if rows is None:
            self._vocabulary(config, models, plan, written, findings)
        if config.tokenizer is None and config.tokenizer_source is None:
            self._tokenizers(config, models, plan, findings)
        self._cost(recipe, method, written, tensors.unknown, merged, findings)
        if recipe.name is None or not written or tensors.unknown or findings.has_errors():
            return None
        return self._output(recipe.name, config, models, plan, written, scratch)

    def _vocabulary(
        self,
        config: MergeConfiguration,
        models: Mapping[ModelReference, Model],
        plan: Plan,
        written: list[Output],
        findings: Findings,
    ) -> None:
        settings = _model_out_config(with_stand_ins(config, models), plan.architecture, self.options.trust_remote_code)
        donor = models[config.base_model] if config.base_model else models[config.referenced_models()[0]]
        check_vocabulary(settings, str(donor), plan, written, findings)

    def _tokenizers(
        self, config: MergeConfiguration, models: Mapping[ModelReference, Model], plan: Plan, findings: Findings
    ) -> None:
        groups = [planned.inputs for planned in plan.tensors if planned.weight.vocabulary_axis is not None]
        users = dict.fromkeys(model for group in groups for model, _ in group)
        donor = models[config.base_model] if config.base_model else None
        ordered = [*([donor] if donor else []), *(model for model in users if model is not donor)]
        check_tokenizers(ordered, any(len(group) > 1 for group in groups), findings)

    def _cost(
        self,
        recipe: Recipe,
        method: MergeMethod,
        written: list[Output],
        unknown: int,
        merged: list[Model],
        findings: Findings,
    ) -> None:
        # Named merges go to mergekit-multi's folder for intermediates, which is not known here.
        out = self.out if recipe.name is None else None
        buffers = _OWN_BUFFERS if method.spec.name.startswith("parameter_selection") else 0
        cost = cost_of(recipe.name, written, unknown, None if out is None else Path(out), self.options, buffers)
        self.costs.append(cost)
        check_room(cost, None if out is None else Path(out), self.options, findings)
        if out is not None:
            check_out(out, merged, shard_count(written, self.options), self.options, findings)

    def _output(
        self,
        name: str,
        config: MergeConfiguration,
        models: Mapping[ModelReference, Model],
        plan: Plan,
        written: list[Output],
        scratch: Path,
    ) -> Checkpoint:
        """Describe the result for the merges of the same file that need it."""
        folder = scratch / "output"
        _model_out_config(with_stand_ins(config, models), plan.architecture).save_pretrained(folder)
        donor = models[config.base_model] if config.base_model else next(iter(models.values()))
        for file in TOKENIZER_FILES:
            if (donor.checkpoint.folder / file).exists():
                (folder / file).write_bytes((donor.checkpoint.folder / file).read_bytes())
        tensors = {output.name: output.tensor for output in written}
        return Checkpoint(name, folder, read_json(folder / "config.json"), tensors, frozenset(), plain=False)
