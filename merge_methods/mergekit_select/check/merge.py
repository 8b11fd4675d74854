"""The merge under check: what its checks look at, and where they put what they find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_select.errors import one_line
from mergekit_select.findings import Cost, Finding, Findings, Severity
from mergekit_select.inputs.checkpoint import Checkpoint, StoredTensor
from mergekit_select.inputs.references import with_references

_Part = TypeVar("_Part")


@dataclass(frozen=True, eq=False)
class Model:
    """A model that a recipe names; two are equal only if they are the same object.

    Attributes:
        reference: As the recipe names it.
        stand_in: A reference to a local folder that mergekit can plan with; the same where that is safe.
        checkpoint: Its description.
        places: Recipe keys that name it.
    """

    reference: ModelReference
    stand_in: ModelReference
    checkpoint: Checkpoint
    places: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.reference)


@dataclass(frozen=True)
class DescribedTensor:
    """One tensor that the merge writes, as far as descriptions tell.

    Attributes:
        name: In the output.
        tensor: Its description.
        inputs: Bytes held while it is merged, in the dtype that the method sees.
        read: Bytes read from disk for it.
    """

    name: str
    tensor: StoredTensor
    inputs: int
    read: int


@dataclass
class MergeUnderCheck:
    """One merge of a recipe file while it is checked.

    Attributes:
        name: Its name in a mergekit-multi file, else None.
        config: The recipe, as mergekit parsed it.
        method: Its merge method.
        options: mergekit's options for the merge.
        findings: What was found so far.
        models: Every model that it names, by reference, in recipe order.
        cost: What it will take, once that is known.
    """

    name: str | None
    config: MergeConfiguration
    method: MergeMethod
    options: MergeOptions
    findings: Findings = field(default_factory=Findings)
    models: dict[ModelReference, Model] = field(default_factory=dict)
    cost: Cost | None = None

    @property
    def merged(self) -> Sequence[Model]:
        """The models whose tensors are merged; others may give a tokenizer only."""
        merged = set(self.config.referenced_models())
        return [model for reference, model in self.models.items() if reference in merged]

    @property
    def donor(self) -> Model:
        """The model that gives config and tokenizer; without a base model the first of those that may."""
        return self.models[self.config.base_model] if self.config.base_model else next(iter(self.models.values()))

    def settings(self, stand_in: ModelReference) -> PretrainedConfig:
        """Return a model's config as transformers loads it, by code of the model's own where that is trusted."""
        return stand_in.config(trust_remote_code=self.options.trust_remote_code)

    def with_stand_ins(self, part: _Part) -> _Part:
        """Return a copy of a part of the recipe in which mergekit finds every model locally."""
        return with_references(part, lambda reference: self.models[reference].stand_in)

    def explain(self, error: Exception) -> str:
        """Return an error's text, with the models called as the recipe calls them."""
        text = one_line(error)
        for model in self.models.values():
            text = text.replace(str(model.stand_in), str(model))
        return text

    def has_errors(self) -> bool:
        """Whether anything found so far is an error."""
        return bool(self.findings.of(Severity.ERROR))

    def placed_findings(self) -> list[Finding]:
        """Return the findings with their places inside the file."""
        return [*self.findings] if self.name is None else [found.within(self.name) for found in self.findings]
