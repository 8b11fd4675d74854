"""What mergekit would write: which tensors, in which order, of which dtype and shape; no tensor is read for that."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task, TaskUniverse, build_schedule
from mergekit.io.tasks import FinalizeModel, GatherTensors, LoaderCache, LoadTensor, SaveTensor, TensorWriterTask
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary

from mergekit_select.bits import dtype_name
from mergekit_select.errors import PlanError
from mergekit_select.inputs.checkpoint import StoredTensor
from mergekit_select.inputs.files import companion_names, hidden
from mergekit_select.inputs.references import references
from mergekit_select.planner.engine import Engine
from mergekit_select.planner.plan import PlannedTensor
from mergekit_select.planner.reading import Loader
from mergekit_select.planner.vocabulary import row_count

_Tensor = TypeVar("_Tensor")
_COMPANIONS = ("config.json", "tokenizer_config.json")  # what every model on a hub has beside its weights
_SIDE = 4  # elements along an axis of the tensors that a method is tried on


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor that the merge will write.

    Attributes:
        planned: The planned tensor.
        stored: How it will be stored.
        read: Bytes of its inputs.
    """

    planned: PlannedTensor
    stored: StoredTensor
    read: int


def written(engine: Engine) -> list[WrittenTensor]:
    """Return the tensors that mergekit would write, in the order in which it would.

    Raises:
        PlanError: A required tensor is missing.
    """
    trials: dict[Any, torch.dtype | None] = {}
    result = []
    for planned in _in_writing_order(engine):
        inputs = {model: tensor for model, tensor in _inputs(engine, planned).items() if tensor is not None}
        if not inputs:
            continue
        dtype = _result_dtype(planned, inputs, trials)
        if dtype is not None:
            shape = tuple(next(iter(inputs.values())).shape)
            stored = StoredTensor(dtype_name(dtype), shape, math.prod(shape) * dtype.itemsize)
            result.append(WrittenTensor(planned, stored, sum(tensor.nbytes for tensor in inputs.values())))
    return result


def filled(tensors: Sequence[_Tensor], limit: int, size: Callable[[_Tensor], int]) -> Iterator[list[_Tensor]]:
    """Yield the tensors of each shard, as mergekit's ``TensorWriter`` fills them.

    Args:
        tensors: In mergekit's order.
        limit: Most bytes of a shard that holds more than one; 0 or less for no bound.
        size: Bytes of a tensor.
    """
    shard: list[_Tensor] = []
    held = 0
    for tensor in tensors:
        if shard and 0 < limit < held + size(tensor):
            yield shard
            shard, held = [], 0
        shard.append(tensor)
        held += size(tensor)
    if shard:
        yield shard


def loads(planned: PlannedTensor) -> Mapping[ModelReference, LoadTensor]:
    """Return what mergekit loads for a tensor, by model."""
    task: Any = planned.task.gather_tensors
    gather: GatherTensors = task if isinstance(task, GatherTensors) else task.gather_tensors
    return {load.model: load for load in gather.arguments().values() if isinstance(load, LoadTensor)}


def input_files(engine: Engine) -> list[Path]:
    """Return the files of a plan's models, with absolute paths: weights, and all else that the output may be made from.

    Of a model on a hub, whose commit is in the path of each file, those beside the weights that say which commit it is:
    others may be downloaded later.
    """
    files: list[Path] = []
    folders: set[Path] = set()
    for loader in LoaderCache().loaders.values():
        assert isinstance(loader, Loader)
        files += loader.files
        folders.add(Path(loader.index.base_path))
    for _, model in references(engine.plan.config):
        path, revision = model.model.path, model.model.revision
        cached = None if os.path.isdir(path) else try_to_load_from_cache(path, _COMPANIONS[-1], revision=revision)
        folders.add(Path(cached).parent if isinstance(cached, str) else Path(path))
    for folder in folders:
        names = _COMPANIONS if folder.parent.name == "snapshots" else (*_COMPANIONS, *_beside(folder))
        files += (folder / name for name in names if (folder / name).is_file())
    return sorted({file.absolute() for file in files})


def _beside(folder: Path) -> list[str]:
    return [name for name in companion_names(folder) if not hidden(name)] if folder.is_dir() else []


def expect(planned: PlannedTensor) -> None:
    """Have the system read a tensor's inputs ahead."""
    for model, load in loads(planned).items():
        loader = LoaderCache().get(model)
        name = load._resolve_name(loader)
        if isinstance(loader, Loader) and name is not None:
            loader.expect(name)


def _in_writing_order(engine: Engine) -> list[PlannedTensor]:
    """Return the tensors in the order of mergekit's own schedule, ties included: shards are filled in it."""
    writer = TensorWriterTask(out_path="", max_shard_size=0)
    saves = [
        SaveTensor(
            tensor_name=planned.name,
            tensor_task=planned.task,
            writer_task=writer,
            clone=False,
            optional=planned.weight.optional,
        )
        for planned in engine.plan.tensors
    ]
    targets: list[Task[Any]] = [*saves, FinalizeModel(tensor_save_tasks=tuple(saves), writer_task=writer)]
    if engine.plan.tokenizer is not None:
        targets.append(engine.plan.tokenizer)
    universe = TaskUniverse(targets)
    schedule = build_schedule([universe.add_task(target) for target in targets], {})
    planned_by_name = {planned.name: planned for planned in engine.plan.tensors}
    executed = (handle.task() for handle in schedule.tasks)
    return [planned_by_name[task.tensor_name] for task in executed if isinstance(task, SaveTensor)]


def _inputs(engine: Engine, planned: PlannedTensor) -> dict[ModelReference, torch.Tensor | None]:
    """Return tensors without data, shaped as the method would get them."""
    inputs = {model: _described(load) for model, load in loads(planned).items()}
    task, axis = planned.task.gather_tensors, planned.weight.vocabulary_axis
    present = [tensor for tensor in inputs.values() if tensor is not None]
    if axis is None or not present:
        return inputs
    if isinstance(task, PermutedVocabulary):
        rows = row_count(engine.plan.config, engine.tokenizer(task.tokenizer_task))
    elif isinstance(task, TruncatedVocabulary):
        rows = min(tensor.shape[axis] for tensor in present)
    else:
        return inputs
    return {
        model: None if tensor is None else tensor.new_empty([*tensor.shape[:axis], rows, *tensor.shape[axis + 1 :]])
        for model, tensor in inputs.items()
    }


def _described(load: LoadTensor) -> torch.Tensor | None:
    """Do with descriptions what ``LoadTensor.execute`` does with tensors."""
    loader: Any = LoaderCache().get(load.model)
    stored: Mapping[str, StoredTensor] = loader.stored

    def empty(name: str) -> torch.Tensor:
        return torch.empty(stored[name].shape, dtype=getattr(torch, stored[name].dtype), device="meta")

    name = load._resolve_name(loader)
    if name is not None:
        tensor: torch.Tensor | None = empty(name)
    else:
        kind = load.model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
        sources = {key: (lambda key=key: empty(key)) for key in stored}
        converted = (
            convert_checkpoint_tensors(kind, sources, target) for target in (load.tensor, *(load.aliases or ()))
        )
        tensor = next((found for found in converted if found is not None), None)
    if tensor is None and not load.optional:
        raise PlanError(f"tensor {load.tensor!r} is required, and model {load.model} does not have it")
    return tensor if tensor is None or load.dtype is None else tensor.to(dtype_from_name(load.dtype))


def _result_dtype(
    planned: PlannedTensor, inputs: Mapping[ModelReference, torch.Tensor], trials: dict[Any, torch.dtype | None]
) -> torch.dtype | None:
    """Return the dtype of what is written, None if nothing is, by executing the task on small random tensors."""
    shapes = [(model, tensor.dtype, tuple(min(n, _SIDE) for n in tensor.shape)) for model, tensor in inputs.items()]
    parameters = repr((sorted(planned.shared.items()), [*planned.per_input.items()]))
    key = (*shapes, planned.base, planned.stored_as, planned.weight.optional, parameters)
    if key not in trials:
        trials[key] = _try(planned, shapes)
    return trials[key]


def _try(
    planned: PlannedTensor, shapes: Sequence[tuple[ModelReference, torch.dtype, tuple[int, ...]]]
) -> torch.dtype | None:
    generator = torch.Generator().manual_seed(0)
    small = {model: torch.randn(shape, generator=generator).to(dtype) for model, dtype, shape in shapes}
    try:
        # Some methods draw from torch's global generator.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            result = planned.task.execute(tensors=small)
    except Exception:  # the merge itself will say what is wrong, with the tensor's name
        dtype = next(iter(small.values())).dtype
        for _, other, _ in shapes:
            dtype = torch.promote_types(dtype, other)
        return planned.stored_as or dtype
    return None if result is None else planned.stored_as or result.dtype
