"""Open the models of a recipe, and plan the merge from them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from mergekit import merge_methods
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_select import kinds
from mergekit_select.errors import PlanError, UnreadableError, one_line
from mergekit_select.inputs.checkpoint import read_header
from mergekit_select.inputs.files import require_readable
from mergekit_select.inputs.hub import require_repository
from mergekit_select.inputs.references import is_local
from mergekit_select.planner.engine import Engine, at
from mergekit_select.planner.internals import isolated, lora_folder
from mergekit_select.planner.plan import Plan, Planning, unknown_dtypes
from mergekit_select.planner.reading import Loader


@contextmanager
def opened(config: MergeConfiguration, options: MergeOptions | None = None) -> Iterator[Engine]:
    """Plan a merge from its models; the engine is usable inside the ``with`` block.

    Models on a hub are downloaded, and LoRA adapters merged into ``lora_merge_cache``, as in the merge.

    Args:
        config: The recipe; not modified.
        options: As for the merge.

    Raises:
        UnreadableError: A model cannot be read.
        PlanError: mergekit refuses the merge.
        ParameterError: A recipe parameter breaks its rule.
    """
    options = options or MergeOptions()
    with isolated(options) as cache:
        if options.random_seed is None:
            yield Engine(_plan(config, options, cache))
        else:  # mergekit seeds the whole process, here only the block sees it
            with torch.random.fork_rng():
                torch.manual_seed(options.random_seed)
                yield Engine(_plan(config, options, cache))


@contextmanager
def with_adapter_cache(options: MergeOptions | None) -> Iterator[MergeOptions]:
    """Give a block options with an empty folder for merged adapters, within the one that they name if they name one.

    mergekit takes what lies in a folder from earlier, which may be of other adapters.

    Raises:
        UnreadableError: The folder cannot be made.
    """
    options = options or MergeOptions()
    cache = options.lora_merge_cache
    with ExitStack() as stack:
        try:
            if cache is not None:
                os.makedirs(cache, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mergekit-select-", dir=cache))
        except OSError as error:
            raise UnreadableError(f"cannot write to the LoRA merge cache: {one_line(error)}") from error
        yield options.model_copy(update={"lora_merge_cache": folder})


def _plan(config: MergeConfiguration, options: MergeOptions, cache: LoaderCache) -> Plan:
    own = config.model_copy(deep=True)  # the planner rewrites it
    with at("the recipe"):
        merge_methods.get(own.merge_method)
    for key, name in unknown_dtypes(own):
        raise PlanError(f"{kinds.DTYPE_UNKNOWN.text(key=key)}, got {name!r}")
    for model in sorted(own.referenced_models(), key=str):
        with at(f"model {model}", UnreadableError):
            _open(model, cache, options)
    with at("planning the merge"):
        planning = Planning(own, get_architecture_info(own, options), options)
        planning.normalise()
        plan = planning.plan(config)
        for _, error in plan.failures:
            raise error
    return plan


def _open(model: ModelReference, cache: LoaderCache, options: MergeOptions) -> None:
    """Open a model, with a loader of ours in the cache."""
    path = model.model.path
    if is_local(path) and not os.path.isdir(path):
        raise UnreadableError(f"model {model}: there is no folder {path}; local paths begin at the current folder")
    if model.lora is not None and cache.lora_cache_dir is None:
        raise PlanError(f"model {model}: {kinds.LORA_CACHE.text()}")
    if os.path.isdir(path):
        require_readable(Path(path))
    for part in (model.model, model.lora):
        if part is not None and not os.path.isdir(part.path):
            require_repository(part.path, part.revision)
    model.config(trust_remote_code=options.trust_remote_code)
    whole = Path(path, "model.safetensors")
    if whole.is_file() and not Path(f"{whole}.index.json").exists() and model.lora is None:
        read_header(whole)  # mergekit's own error does not name the file
    _merge_adapter(model, cache)
    cache.loaders[model] = Loader(str(model), cache.get(model))


def _merge_adapter(model: ModelReference, cache: LoaderCache) -> None:
    """Merge an adapter as mergekit does, but in a folder of the cache that is there whole or not at all.

    mergekit makes the folder first, and takes it for a merge wherever it finds it.
    """
    if model.lora is None or cache.lora_cache_dir is None:
        return
    merged = lora_folder(cache.lora_cache_dir, model.model, model.lora)
    merged.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(merged.parent / ".lock"):
        unfinished = merged.parent / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        if merged.exists():
            return
        model.merged(str(unfinished), cache.trust_remote_code, cache.lora_merge_dtype)
        (unfinished / merged.name).rename(merged)
        unfinished.rmdir()
