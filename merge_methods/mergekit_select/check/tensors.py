"""Check the plan tensor by tensor, with descriptions instead of tensors: presence, shapes, dtypes, parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from mergekit.architecture import WeightInfo
from mergekit.architecture.base import ConfiguredModelArchitecture
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.merge_methods import OptionalTensorPolicy

from mergekit_select import kinds
from mergekit_select.bits import dtype_name
from mergekit_select.check.dtypes import check_base_dtype, dtype_of, merged_dtype
from mergekit_select.check.merge import DescribedTensor, MergeUnderCheck
from mergekit_select.check.parameters import ParameterCheck
from mergekit_select.errors import one_line
from mergekit_select.findings import TensorFindings, some
from mergekit_select.inputs.checkpoint import StoredTensor
from mergekit_select.methods import RESAMPLING
from mergekit_select.planner.plan import Plan, PlannedTensor

# Buffers that architectures recompute; mergekit leaves them out and nobody misses them.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)$")

_Entries = Sequence[tuple[ModelReference, StoredTensor]]


class TensorCheck:
    """Walks a plan and does with descriptions what mergekit will do with tensors.

    Args:
        merge: The merge; gets the findings.
        plan: Its plan.
        rows: Rows of the output's vocabulary where mergekit aligns tokenizers, else None.

    Attributes:
        unknown: How many tensors are written whose size is not known.
    """

    def __init__(self, merge: MergeUnderCheck, plan: Plan, rows: int | None) -> None:
        self.merge = merge
        self.plan = plan
        self.rows = rows
        self.method = merge.method
        self.findings = TensorFindings(merge.findings)
        self.parameters = ParameterCheck(merge.method, self.findings)
        self.unknown = 0
        self._used: dict[ModelReference, set[str]] = {}
        self._converts: set[ModelReference] = set()

    def run(self) -> list[DescribedTensor]:
        """Return what is written, having added what is wrong."""
        for name, error in self.plan.failures:
            self.parameters.failed(name, error, self.merge.explain(error))
        if self.method.spec.name == "multislerp" and any(planned.base for planned in self.plan.tensors):
            # Common where layers are frozen in training, and seen in the values only.
            self.findings.note(kinds.MULTISLERP_BASE, "merge_method", "multislerp")
        written = [tensor for planned in self.plan.tensors if (tensor := self._tensor(planned))]
        self._ignored()
        self.findings.flush()
        return written

    def _tensor(self, planned: PlannedTensor) -> DescribedTensor | None:
        entries: list[tuple[ModelReference, StoredTensor | None]] = []
        for model, weight in planned.inputs:
            found, tensor = self._find(model, weight)
            if found:
                entries.append((model, tensor))
            elif not weight.optional:
                self.findings.add(kinds.TENSOR_MISSING, weight.name, model)
                return None
        if not entries or not self._enough(planned, [model for model, _ in entries]):
            return None
        described = [(model, tensor) for model, tensor in entries if tensor is not None]
        if len(described) < len(entries):
            self.findings.add(kinds.TENSOR_CONVERTED, planned.name)
            self.unknown += 1
            return None
        return self._merge(planned, described)

    def _find(self, reference: ModelReference, weight: WeightInfo) -> tuple[bool, StoredTensor | None]:
        """Whether mergekit would find the tensor, and its description where no conversion is needed."""
        checkpoint = self.merge.models[reference].checkpoint
        tensors = checkpoint.tensors or {}
        for name in names_of(weight):
            if name in tensors:
                self._used.setdefault(reference, set()).add(name)
                return True, tensors[name]
        kind = checkpoint.config.get("model_type")
        for name in (weight.name, *(weight.aliases or ())):
            if can_convert_checkpoint_keys(kind, set(tensors), name):
                self._converts.add(reference)
                return True, None
        return False, None

    def _enough(self, planned: PlannedTensor, present: list[ModelReference]) -> bool:
        """Apply the method's rule for optional tensors; False where nothing is merged."""
        missing = [model for model, _ in planned.inputs if model not in present]
        if not missing:
            return True
        spec = self.method.spec
        policy, only_base, alone = spec.optional_tensor_policy, present == [planned.base], len(present) == 1
        kind = kinds.TENSOR_PARTIAL
        if alone and (
            policy is OptionalTensorPolicy.PASSTHROUGH_SINGLETON
            or (policy is OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON and only_base)
            or (policy is OptionalTensorPolicy.BASE_OR_SKIP and only_base)
        ):
            kind = kinds.TENSOR_COPIED
        elif policy is OptionalTensorPolicy.BASE_OR_SKIP and len(present) < spec.contract.min_inputs:
            kind = kinds.TENSOR_SKIPPED
        else:
            try:
                self.method.validate_inputs(present, planned.base)
            except ValueError as error:
                problem = one_line(error)
                self.findings.add(kinds.TENSOR_NEEDED, planned.name, some(missing), method=spec.name, problem=problem)
                return False
        self.findings.add(kind, planned.name, some(missing), holder=present[0])
        return kind is not kinds.TENSOR_SKIPPED

    def _merge(self, planned: PlannedTensor, entries: _Entries) -> DescribedTensor | None:
        cast = dtype_of(planned.weight.force_dtype or self.merge.config.dtype)
        dtypes = [cast or getattr(torch, tensor.dtype) for _, tensor in entries]
        alone = len(entries) < len(planned.inputs) and len(entries) == 1
        shape = self._shape(planned, entries, alone)
        if shape is None:
            return None
        merged = None if alone else merged_dtype(planned, entries, dtypes, self.findings)
        if merged is None and not alone:
            return None
        working = merged or dtypes[0]
        result = working
        if merged is not None and merged.is_floating_point:
            if self.method.spec.name == RESAMPLING:
                check_base_dtype(planned, entries, self.merge.config.dtype, self.findings)
            models = [model for model, _ in entries]
            self.parameters.weights(planned, models)
            # Some methods return another dtype than they were given.
            result = self.parameters.dry_run(planned, models, merged, shape) or working
        stored = dtype_of(planned.stored_name) or result
        count = math.prod(shape)
        return DescribedTensor(
            planned.name,
            StoredTensor(dtype_name(stored), shape, count * stored.itemsize),
            sum(count * working.itemsize for _ in entries),
            sum(tensor.nbytes for _, tensor in entries),
        )

    def _shape(self, planned: PlannedTensor, entries: _Entries, alone: bool) -> tuple[int, ...] | None:
        axis = planned.weight.vocabulary_axis
        shapes = [tensor.shape for _, tensor in entries]
        truncated = self.merge.options.unsafe_truncate_embeddings
        if axis is not None and (self.rows is not None or truncated) and all(len(s) > axis for s in shapes):
            rows = self.rows if self.rows is not None else min(shape[axis] for shape in shapes)
            shapes = [(*shape[:axis], rows, *shape[axis + 1 :]) for shape in shapes]
        if len(set(shapes)) == 1 or alone:
            return shapes[0]
        holders: dict[tuple[int, ...], ModelReference] = {}
        for shape, (model, _) in zip(shapes, entries, strict=True):
            holders.setdefault(shape, model)
        rest = {shape if axis is None else (*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
        kind = kinds.VOCABULARIES_DIFFER if axis is not None and len(rest) == 1 else kinds.SHAPES_DIFFER
        self.findings.add(
            kind, planned.name, some((f"{list(shape)} in {model}" for shape, model in holders.items()), 4)
        )
        return None

    def _ignored(self) -> None:
        """Add tensors that the models have and the architecture does not list."""
        for model in self.merge.merged:
            if model.reference in self._converts or not self.plan.tensors:
                continue
            settings = self.merge.settings(model.stand_in)
            known = set(self._used.get(model.reference, ()))
            for weight in ConfiguredModelArchitecture(info=self.plan.architecture, config=settings).all_weights():
                known.update(names_of(weight))
            stored = model.checkpoint.tensors or {}
            ignored = [name for name in stored if name not in known and not _BUFFERS.search(name)]
            # A tower or head too many is common; a model of which most is left out is of no use.
            kind = kinds.TENSORS_MOSTLY_IGNORED if len(ignored) * 2 > len(stored) else kinds.TENSOR_IGNORED
            for name in ignored:
                self.findings.add(kind, name, who=str(model))


def names_of(weight: WeightInfo) -> tuple[str, ...]:
    """Return the names under which mergekit looks for a tensor, the first that is there being taken."""
    return (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
