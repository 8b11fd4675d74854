"""Replays a merge in memory, tensor by tensor: mergekit's planner and inputs, nothing written.

What mergekit keeps for a whole process, and what it changes in the configuration it is given, is undone here,
so that a replay neither sees nor leaves anything.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import safetensors
import torch
import yaml
from mergekit import merge_methods
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.architecture.auto import infer_architecture_info
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer
from mergekit.tokenizer import build as tokenizer_build
from pydantic import BaseModel, ValidationError
from transformers import PretrainedConfig

import mergekit_select.methods  # noqa: F401  # registers the two methods, for where the startup file has not
from mergekit_select.errors import MergekitSelectError


class UnreadableError(MergekitSelectError):
    """A file is missing, or cannot be read as what it should be."""


class ReplayError(MergekitSelectError):
    """Everything can be read, but mergekit refuses the merge."""


def one_line(error: BaseException) -> str:
    """Return an error's text as one line, its type in front where the text alone would say too little."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place + ': ' if place else ''}{first['msg']}"
    text = " ".join(str(error).split())
    if isinstance(error, MergekitSelectError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_recipe(path: str | os.PathLike[str]) -> MergeConfiguration:
    """Read a recipe as mergekit-yaml does.

    Raises:
        UnreadableError: The file is missing, no UTF-8 text, not YAML, or not one recipe.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise UnreadableError(f"a recipe is YAML in UTF-8, {path} is not text; name the recipe's file") from error
    except yaml.composer.ComposerError as error:
        raise UnreadableError(
            f"{path} must hold one YAML document: {one_line(error)}; of a mergekit-multi file, give one"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(document, dict):
        what = "nothing" if document is None else f"a {type(document).__name__}"
        raise UnreadableError(f"a recipe is a mapping with the key merge_method, {path} holds {what}")
    try:
        return MergeConfiguration.model_validate(document)
    except Exception as error:  # mergekit's validators raise what they like
        raise UnreadableError(f"{path} is no recipe: {one_line(error)}") from error


def relocated(config: MergeConfiguration, locations: Mapping[str, str]) -> MergeConfiguration:
    """Return a copy of a recipe whose models lie elsewhere.

    Args:
        config: The recipe; not modified.
        locations: Old location to new one. An old one matches a model's path, its path with ``@revision``, or
            the folders that its path begins with; where several match, the longest does.

    Raises:
        UnreadableError: An old location matches no model of the recipe.
    """
    unused = dict.fromkeys(locations)
    names: dict[str, None] = {}

    def move(path: ModelPath) -> ModelPath:
        names[str(path)] = None
        matches = [old for old in locations if old in (str(path), path.path) or _is_below(path.path, old)]
        if not matches:
            return path
        for old in matches:
            unused.pop(old, None)
        old = max(matches, key=len)
        if old in (str(path), path.path):
            return ModelPath.model_validate(locations[old])
        return ModelPath(path=locations[old].rstrip("/") + path.path[len(old.rstrip("/")) :], revision=path.revision)

    def walk(value: Any) -> Any:
        if isinstance(value, ModelReference):
            lora = None if value.lora is None else move(value.lora)
            return value.model_copy(update={"model": move(value.model), "lora": lora})
        if isinstance(value, BaseModel):
            return value.model_copy(update={field: walk(getattr(value, field)) for field in type(value).model_fields})
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item) for item in value)
        return value

    result: MergeConfiguration = walk(config.model_copy(deep=True))
    if unused:
        raise UnreadableError(
            f"--map must name a model of the recipe, got {', '.join(map(repr, unused))}; it names {', '.join(names)}"
        )
    return result


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that the merge may write.

    Attributes:
        weight: mergekit's description; ``weight.name`` is the output's name.
        task: What mergekit would execute.
        dtype: What the result is cast to before it is written; None for as it is.
    """

    weight: WeightInfo
    task: ExecuteMergeMethodTask
    dtype: torch.dtype | None

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return str(self.weight.name)


class Replay:
    """A planned merge whose tensors can be computed one by one.

    Attributes:
        config: The recipe as given; not modified.
        tensors: In the order in which mergekit would execute them.
        out_config: The config.json that mergekit would write, but for dtype and the size of an aligned vocabulary.
        tokenizers: Those built so far, each once, for tensors that are aligned to them.
    """

    def __init__(
        self,
        config: MergeConfiguration,
        tensors: Sequence[PlannedTensor],
        out_config: PretrainedConfig,
        options: MergeOptions,
    ):
        self.config = config
        self.tensors = tuple(tensors)
        self.out_config = out_config
        self._options = options
        self.tokenizers: dict[BuildTokenizer, Any] = {}

    def merged(self, planned: PlannedTensor) -> torch.Tensor | None:
        """Compute one tensor as the merge would write it; None where mergekit would skip an optional one.

        Raises:
            MergekitSelectError: The inputs cannot be read, or the merge method refuses them.
        """
        with _telling(f"tensor {planned.name!r}"):
            result: torch.Tensor | None = self._evaluate(planned.task)
            if result is None:
                if not planned.weight.optional:
                    raise ReplayError(f"no value for the required tensor {planned.name!r}")
                return None
            return result if planned.dtype is None else result.to(dtype=planned.dtype)

    def inputs(self, planned: PlannedTensor) -> TensorGroup:
        """Gather one tensor's inputs as the merge method would get them: aligned, in recipe order, with the base.

        Raises:
            MergekitSelectError: They cannot be read, or their shapes differ.
        """
        task = planned.task
        with _telling(f"tensor {planned.name!r}"):
            tensors = self._evaluate(task.gather_tensors)
            entries = tuple(
                TensorEntry(id=model, tensor=tensors[model], is_base=model == task.base_model)
                for model in task.model_order
                if tensors.get(model) is not None
            )
            group = TensorGroup(entries=entries, metadata=TensorMetadata.from_weight_info(planned.weight))
            group.validate_tensors()
            if all(tensor.is_floating_point() for tensor in group.tensors):
                return align_dtype(group, promoted_dtype(group)) if entries else group
            return group

    def _evaluate(self, task: Task[Any]) -> Any:
        """Execute a task after what it depends on; of the results only tokenizers are kept."""
        if isinstance(task, BuildTokenizer):
            if task not in self.tokenizers:
                with no_bar_of_mergekits_own():
                    self.tokenizers[task] = task.execute()
            return self.tokenizers[task]
        arguments = {name: self._evaluate(dependency) for name, dependency in task.arguments().items()}
        if not task.uses_accelerator():
            return task.execute(**arguments)
        device = self._options.device or "cpu"
        result = task.execute(**{name: _moved(value, device) for name, value in arguments.items()})
        return _moved(result, "cpu")


@contextmanager
def replayed(config: MergeConfiguration, options: MergeOptions | None = None) -> Iterator[Replay]:
    """Plan a merge in memory; the replay is usable inside the ``with`` block.

    Models on a hub are downloaded, and LoRA adapters merged into ``lora_merge_cache``, as in the merge.

    Args:
        config: The recipe; not modified.
        options: As for the merge.

    Raises:
        UnreadableError: A model cannot be read.
        ReplayError: mergekit refuses the merge.
        ParameterError: A recipe parameter breaks its rule.
    """
    options = options or MergeOptions()
    # A dictionary of the class: it would answer with loaders of files that have been replaced since.
    loaders = LoaderCache.loaders
    kept = dict(loaders)
    loaders.clear()
    infer_architecture_info.cache_clear()
    try:
        if options.random_seed is None:
            yield _plan(config, options)
        else:  # mergekit seeds the whole process, here only the block sees it
            with torch.random.fork_rng():
                torch.manual_seed(options.random_seed)
                yield _plan(config, options)
    finally:
        loaders.clear()
        loaders.update(kept)


def _plan(config: MergeConfiguration, options: MergeOptions) -> Replay:
    own = config.model_copy(deep=True)  # the planner rewrites it
    with _telling("the recipe"):
        merge_methods.get(own.merge_method)
        cache = LoaderCache()
        cache.setup(options=options)
    models = sorted(own.referenced_models(), key=str)
    for model in models:
        with _telling(f"model {model}", UnreadableError):
            _require_readable(model, cache, options)
    with _telling("planning the merge"):
        architecture = get_architecture_info(own, options)
        # Setting the dtype in a config makes transformers print a warning, and no tensor depends on it.
        without_dtype = own.model_copy(update={"dtype": None, "out_dtype": None})
        out_config = _model_out_config(without_dtype, architecture, options.trust_remote_code)
        planner = MergePlanner(own, architecture, options=options, out_model_config=out_config)
        # Not plan_in_memory: its ReturnTensor fails on a skipped optional tensor where out_dtype is set.
        plan: Callable[[], None] = planner._plan
        plan()
        steps = cast("list[tuple[WeightInfo, ExecuteMergeMethodTask]]", planner._tensors)
        tensors = [
            PlannedTensor(weight, task, dtype_from_name(weight.force_dtype or own.out_dtype)) for weight, task in steps
        ]
        # mergekit's order: neighbours share a shard, so that none is opened twice.
        tensors.sort(key=lambda planned: planned.task.group_label() or "")
    return Replay(config, tensors, out_config, options)


def _require_readable(model: ModelReference, cache: LoaderCache, options: MergeOptions) -> None:
    """Open every file of a model once: what is missing or cut off is better told now than in the middle."""
    path = model.model.path
    if _is_local(path) and not os.path.isdir(path):
        raise UnreadableError(f"model {model}: there is no folder {path}; local paths begin at the current folder")
    if os.path.isdir(path):  # of a config.json that is missing or not to be read, transformers tells a riddle
        Path(path, "config.json").open("rb").close()
    model.config(trust_remote_code=options.trust_remote_code)
    whole = os.path.join(path, "model.safetensors")
    if os.path.isfile(whole) and not os.path.exists(whole + ".index.json") and model.lora is None:
        safetensors_names(whole)  # mergekit's own error does not name the file
    index = cache.get(model).index
    if not index.is_safetensors:
        for shard in index.shards:
            if not os.path.isfile(os.path.join(index.base_path, shard.filename)):
                raise UnreadableError(f"model {model}: the index names the shard {shard.filename}, which is not there")
        return
    for shard in index.shards:
        names = safetensors_names(os.path.join(index.base_path, shard.filename))
        absent = sorted(set(shard.contained_keys) - names)
        if absent:
            raise UnreadableError(
                f"model {model}: the index says that {shard.filename} holds {absent[0]!r}, which it does not"
            )


def _is_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def safetensors_names(path: str) -> set[str]:
    """Return the names of the tensors in a safetensors file, whose header is checked against its size.

    Raises:
        UnreadableError: It is missing, or no whole safetensors file.
    """
    if not os.path.isfile(path):
        raise UnreadableError(f"there is no file {path}; an index or recipe names it")
    try:
        Path(path).open("rb").close()  # safetensors takes a lack of permission for a lack of the file
        with safetensors.safe_open(path, framework="pt") as file:
            return set(file.keys())
    except OSError as error:
        raise UnreadableError(f"cannot read {path}: {one_line(error)}") from error
    except safetensors.SafetensorError as error:
        raise UnreadableError(f"{path} is no whole safetensors file: {one_line(error)}") from error


@contextmanager
def _telling(place: str, kind: type[MergekitSelectError] = ReplayError) -> Iterator[None]:
    """Let errors of mergekit and below say the place; those of ours say it themselves."""
    try:
        yield
    except MergekitSelectError:
        raise
    except (OSError, safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{place}: {one_line(error)}") from error
    except Exception as error:  # nobody lists what mergekit, transformers and peft raise
        raise kind(f"{place}: {one_line(error)}") from error


@contextmanager
def no_bar_of_mergekits_own() -> Iterator[None]:
    """Building a tokenizer draws a progress bar that no option of mergekit's switches off."""
    silent = types.SimpleNamespace(tqdm=lambda iterable, **_: iterable)
    with mock.patch.object(tokenizer_build, "tqdm", silent):
        yield


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
