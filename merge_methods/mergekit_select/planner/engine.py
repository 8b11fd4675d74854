"""A plan made from the models themselves, whose tensors can be computed one by one, with nothing written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype
from mergekit.tokenizer import BuildTokenizer
from mergekit.tokenizer.build import TokenizerInfo
from transformers import PretrainedConfig

from mergekit_select.errors import MergekitSelectError, PlanError, UnreadableError, one_line
from mergekit_select.inputs.references import donor
from mergekit_select.planner.internals import (
    output_config,
    quiet_tokenizers,
    resize_vocabulary,
    write_code,
    write_companions,
)
from mergekit_select.planner.plan import Plan, PlannedTensor, in_execution_order


class Engine:
    """Computes the tensors of a plan.

    Attributes:
        plan: What mergekit would do.
        tensors: The plan's, in the order in which mergekit would execute them.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._union: Path | None = None
        self.tensors: Sequence[PlannedTensor] = tuple(in_execution_order(plan.tensors))
        self._tokenizers: dict[BuildTokenizer, TokenizerInfo] = {}

    def merged(self, planned: PlannedTensor) -> torch.Tensor | None:
        """Compute one tensor as the merge would write it; None where mergekit would skip an optional one.

        Raises:
            MergekitSelectError: The inputs cannot be read, or the merge method refuses them.
        """
        with at(f"tensor {planned.name!r}"):
            result: torch.Tensor | None = self._evaluate(planned.task)
            if result is None:
                if not planned.weight.optional:
                    raise PlanError(f"no value for the required tensor {planned.name!r}")
                return None
            return result if planned.stored_as is None else result.to(dtype=planned.stored_as)

    def inputs(self, planned: PlannedTensor) -> TensorGroup:
        """Gather one tensor's inputs as the merge method would get them: aligned, in recipe order, with the base.

        Raises:
            MergekitSelectError: They cannot be read, or their shapes differ.
        """
        task = planned.task
        with at(f"tensor {planned.name!r}"):
            tensors = self._evaluate(task.gather_tensors)
            entries = tuple(
                TensorEntry(id=model, tensor=tensors[model], is_base=model == task.base_model)
                for model in task.model_order
                if tensors.get(model) is not None
            )
            group = TensorGroup(entries=entries, metadata=TensorMetadata.from_weight_info(planned.weight))
            group.validate_tensors()
            if entries and all(tensor.is_floating_point() for tensor in group.tensors):
                return align_dtype(group, promoted_dtype(group))
            return group

    def tokenizer(self, task: BuildTokenizer) -> TokenizerInfo:
        """Build the output's tokenizer, once."""
        if task not in self._tokenizers:
            source = task
            if task.tokenizer_source == "union" and self._union is not None:
                source = task.model_copy(
                    update={"tokenizer_source": ModelReference(model=ModelPath(path=str(self._union)))}
                )
            with quiet_tokenizers():
                self._tokenizers[task] = source.execute()
        return self._tokenizers[task]

    def use_union(self, folder: Path) -> None:
        """Take the tokenizer of ``tokenizer: {source: union}``, whose order depends on the process, from a folder."""
        self._union = folder
        self._tokenizers.clear()

    def possible_configs(self) -> Iterable[PretrainedConfig]:
        """Return the config that mergekit would write; without a base model, those of which it takes an arbitrary one.

        To be called after the tensors have been computed, since the size of an aligned vocabulary is among them.
        """
        config, architecture = self.plan.config, self.plan.architecture
        trust = self.plan.options.trust_remote_code
        configs = [output_config(own, architecture, trust) for own in self._with_donors()]
        dtype = config.out_dtype or config.dtype
        for settings in configs if dtype else ():
            settings.dtype = dtype
        for info in self._tokenizers.values():
            for settings in configs:
                resize_vocabulary(settings, architecture, info.tokenizer, config)
        return configs

    def possible_companions(self, scratch: Path) -> Iterator[tuple[Path, Exception | None]]:
        """Write what the merge would put beside weights and config, once for each model that it may take it from.

        Args:
            scratch: An empty folder.

        Yields:
            A folder with the files, and why there is no tokenizer, where mergekit would go on without one.

        Raises:
            MergekitSelectError: They cannot be read.
        """
        plan = self.plan
        for number, config in enumerate(self._with_donors()):
            folder = scratch / f"companions-{number}"
            folder.mkdir()
            with at("the output's tokenizer"):
                tokenizer = None if plan.tokenizer is None else self.tokenizer(plan.tokenizer).tokenizer
                failure = write_companions(config, plan.architecture, plan.options, tokenizer, folder)
                write_code(config, plan.architecture, plan.options, folder)
            if failure is not None and any(folder.iterdir()):  # some files could be copied: the model is damaged
                raise UnreadableError(f"the output's tokenizer: {one_line(failure)}") from failure
            yield folder, failure

    def _with_donors(self) -> list[MergeConfiguration]:
        """Return the recipe with each model as its base of which mergekit may take config and tokenizer."""
        config = self.plan.config
        known = donor(config)
        donors = [config.base_model] if known is not None else sorted(config.referenced_models(), key=str)
        return [config.model_copy(update={"base_model": model}, deep=True) for model in donors]

    def _evaluate(self, task: Task[Any]) -> Any:
        """Execute a task after what it depends on; of the results only tokenizers are kept."""
        if isinstance(task, BuildTokenizer):
            return self.tokenizer(task)
        arguments = {name: self._evaluate(dependency) for name, dependency in task.arguments().items()}
        if not task.uses_accelerator():
            return task.execute(**arguments)
        device = self.plan.options.device or "cpu"
        result = task.execute(**{name: _moved(value, device) for name, value in arguments.items()})
        return _moved(result, "cpu")


@contextmanager
def at(place: str, kind: type[MergekitSelectError] = PlanError) -> Iterator[None]:
    """Let errors of mergekit and below name the place; those of ours name it themselves."""
    try:
        yield
    except MergekitSelectError:
        raise
    except (OSError, safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{place}: {one_line(error)}") from error
    except Exception as error:  # nobody lists what mergekit, transformers and peft raise
        raise kind(f"{place}: {one_line(error)}") from error


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
