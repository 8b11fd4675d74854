"""Findings that the plan gives tensor by tensor: presence, shapes, dtypes, weights; and what the merge will take."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mergekit.architecture import WeightInfo
from mergekit.architecture.base import ConfiguredModelArchitecture
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod, OptionalTensorPolicy

from mergekit_select.check_dtypes import check_base_dtype, dtype_of, merged_dtype
from mergekit_select.check_parameters import ParameterCheck
from mergekit_select.findings import Findings, GroupedFindings, one_line, some
from mergekit_select.models import Model
from mergekit_select.planning import Plan, Planned
from mergekit_select.safetensors_header import Tensor

# Buffers that architectures recompute; mergekit leaves them out and nobody misses them.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)$")


@dataclass(frozen=True)
class Output:
    """One tensor that the merge writes, as far as descriptions tell.

    Attributes:
        name: In the output.
        tensor: Its description.
        inputs: Bytes held while it is merged, in the dtype that the method sees.
        read: Bytes read from disk for it.
    """

    name: str
    tensor: Tensor
    inputs: int
    read: int


class TensorCheck:
    """Walks a plan and does with descriptions what mergekit will do with tensors.

    Args:
        config: The merge.
        method: Its method.
        plan: Its plan.
        vocabulary: Rows of the output's vocabulary where mergekit aligns tokenizers, else None.
        truncate: Whether vocabularies are cut to the smallest.
        findings: Where to add what is wrong.
    """

    def __init__(
        self,
        config: MergeConfiguration,
        method: MergeMethod,
        plan: Plan,
        vocabulary: int | None,
        truncate: bool,
        findings: Findings,
    ) -> None:
        self.config = config
        self.method = method
        self.plan = plan
        self.vocabulary = vocabulary
        self.truncate = truncate
        self.problems = GroupedFindings(findings)
        self.parameters = ParameterCheck(method, self.problems)
        self.used: dict[Model, set[str]] = {}
        self.converts: set[Model] = set()
        self.unknown = 0

    def run(self, models: Sequence[Model]) -> list[Output]:
        """Return what is written, having added what is wrong."""
        for name, error, text in self.plan.failures:
            self.parameters.failed(name, error, text)
        if self.method.spec.name == "multislerp" and any(planned.base for planned in self.plan.tensors):
            # Common where layers are frozen in training, and seen in the values only.
            message = "with a base model multislerp fails on any tensor that no sub-model has moved"
            self.problems.findings.note(
                "not-known", "merge_method", "multislerp", message, "leave out base_model if so"
            )
        outputs = [output for planned in self.plan.tensors if (output := self._tensor(planned))]
        self._ignored(models)
        self.problems.flush()
        return outputs

    def _tensor(self, planned: Planned) -> Output | None:
        entries: list[tuple[Model, Tensor | None]] = []
        for model, weight in planned.inputs:
            found, tensor = self._find(model, weight)
            if found:
                entries.append((model, tensor))
            elif not weight.optional:
                self.problems.add(
                    "error",
                    "tensor-missing",
                    weight.name,
                    str(model),
                    "mergekit needs the tensor from every model, and this one has not got it",
                    "choose a complete model of the same architecture",
                )
                return None
        if not entries or not self._enough(planned, [model for model, _ in entries]):
            return None
        if any(tensor is None for _, tensor in entries):
            message = (
                "transformers converts the checkpoint's tensors to this one, so that shape and dtype are not known"
            )
            self.problems.add("note", "not-known", planned.name, "", message, "nothing needs doing")
            self.unknown += 1
            return None
        return self._merge(planned, [(model, tensor) for model, tensor in entries if tensor is not None])

    def _find(self, model: Model, weight: WeightInfo) -> tuple[bool, Tensor | None]:
        """Whether mergekit would find the tensor, and its description where no conversion is needed."""
        tensors = model.checkpoint.tensors or {}
        for name in (weight.name, *(weight.aliases or ()), *(weight.tied_names or ())):
            if name in tensors:
                self.used.setdefault(model, set()).add(name)
                return True, tensors[name]
        kind = model.checkpoint.config.get("model_type")
        for name in (weight.name, *(weight.aliases or ())):
            if can_convert_checkpoint_keys(kind, set(tensors), name):
                self.converts.add(model)
                return True, None
        return False, None

    def _enough(self, planned: Planned, present: list[Model]) -> bool:
        """Apply the method's rule for optional tensors; False where nothing is merged."""
        missing = [model for model, _ in planned.inputs if model not in present]
        if not missing:
            return True
        spec = self.method.spec
        policy, only_base = spec.optional_tensor_policy, present == [planned.base]
        alone = len(present) == 1
        message = "an optional tensor is missing from some of the models; it is merged from those that have it"
        if alone and (
            policy is OptionalTensorPolicy.PASSTHROUGH_SINGLETON
            or (policy is OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON and only_base)
            or (policy is OptionalTensorPolicy.BASE_OR_SKIP and only_base)
        ):
            message = f"an optional tensor is missing from all models but {present[0]}; it is copied"
        elif policy is OptionalTensorPolicy.BASE_OR_SKIP and len(present) < spec.contract.min_inputs:
            message = "an optional tensor is missing from too many models; the output will not have it"
            self.problems.add("warning", "tensor-partial", planned.name, some(missing), message, "choose other models")
            return False
        else:
            try:
                self.method.validate_inputs(present, planned.base)
            except ValueError as error:
                text = f"a tensor that {spec.name} needs is missing: {one_line(error)}"
                self.problems.add("error", "tensor-missing", planned.name, some(missing), text, "choose other models")
                return False
        self.problems.add("warning", "tensor-partial", planned.name, some(missing), message, "see that it is meant")
        return True

    def _merge(self, planned: Planned, entries: list[tuple[Model, Tensor]]) -> Output | None:
        weight = planned.weight
        cast = dtype_of(weight.force_dtype or self.config.dtype)
        dtypes = [cast or getattr(torch, tensor.dtype) for _, tensor in entries]
        alone = len(entries) < len(planned.inputs) and len(entries) == 1
        shape = self._shape(planned, entries)
        if shape is None:
            return None
        merged = None if alone else merged_dtype(planned, entries, dtypes, self.problems)
        if merged is None and not alone:
            return None
        working = merged or dtypes[0]
        result = working
        if merged is not None and merged.is_floating_point:
            if self.method.spec.name == "parameter_selection_resampling":
                check_base_dtype(planned, entries, self.config.dtype, self.problems)
            self.parameters.weights(planned, [model for model, _ in entries])
            # Some methods return another dtype than they were given.
            result = self.parameters.dry_run(planned, entries, merged, shape) or working
        # What the writer casts to; a tensor that is copied alone is cast too.
        stored = dtype_of(weight.force_dtype or self.config.out_dtype) or result
        count = math.prod(shape)
        return Output(
            planned.name,
            Tensor(str(stored).removeprefix("torch."), shape, count * stored.itemsize),
            sum(count * working.itemsize for _ in entries),
            sum(tensor.nbytes for _, tensor in entries),
        )

    def _shape(self, planned: Planned, entries: list[tuple[Model, Tensor]]) -> tuple[int, ...] | None:
        axis = planned.weight.vocabulary_axis
        shapes = [tensor.shape for _, tensor in entries]
        if axis is not None and (self.vocabulary is not None or self.truncate) and all(len(s) > axis for s in shapes):
            rows = self.vocabulary if self.vocabulary is not None else min(shape[axis] for shape in shapes)
            shapes = [(*shape[:axis], rows, *shape[axis + 1 :]) for shape in shapes]
        if len(set(shapes)) == 1:
            return shapes[0]
        if len(entries) < len(planned.inputs) and len(entries) == 1:
            return shapes[0]
        kinds: dict[tuple[int, ...], Model] = {}
        for shape, (model, _) in zip(shapes, entries, strict=True):
            kinds.setdefault(shape, model)
        self.problems.add(
            "error",
            "shapes-differ",
            planned.name,
            some((f"{list(shape)} in {model}" for shape, model in kinds.items()), 4),
            "a tensor must have one shape in all models",
            "add tokenizer: {source: base} to align vocabularies" if axis is not None else "choose models of one size",
        )
        return None

    def _ignored(self, models: Sequence[Model]) -> None:
        for model in models:
            if model in self.converts or not self.plan.tensors:
                continue
            settings = model.stand_in.config()
            known: set[str] = set(self.used.get(model, ()))
            for weight in ConfiguredModelArchitecture(info=self.plan.architecture, config=settings).all_weights():
                known |= {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}
            stored = model.checkpoint.tensors or {}
            ignored = [name for name in stored if name not in known and not _BUFFERS.search(name)]
            # A tower or head too many is common; a model of which most is left out is of no use.
            severity = "error" if len(ignored) * 2 > len(stored) else "warning"
            for name in ignored:
                message = "mergekit leaves out tensors that the architecture does not list, without a word"
                remedy = "see that the output needs none, or upgrade mergekit to one that knows the architecture"
                self.problems.add(severity, "tensor-ignored", name, "", message, remedy, f"{model}, ")
