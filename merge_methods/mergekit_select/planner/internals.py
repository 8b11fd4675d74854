"""mergekit's private parts and global state, each used here and nowhere else."""

from __future__ import annotations

import importlib.resources
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit._data import chat_templates
from mergekit.architecture import ModelArchitecture
from mergekit.architecture.auto import infer_architecture_info
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge import (
    _copy_tagalong_files,
    _copy_tokenizer,
    _model_out_config,
    _set_chat_template,
    _update_config_vocab,
)
from mergekit.options import MergeOptions
from mergekit.scripts import multimerge
from mergekit.tokenizer import build as tokenizer_build
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mergekit_select.planner.reading import Loader

# What mergekit keeps belongs to the whole process: one user at a time. Reentrant, since a plan may need another.
_lock = threading.RLock()
stored_config = _model_out_config
_SETTINGS = ("lora_cache_dir", "hf_cache_dir", "lazy_unpickle", "trust_remote_code", "lora_merge_dtype")


@contextmanager
def isolated(options: MergeOptions) -> Iterator[LoaderCache]:
    """Give a block its own cache of open models, empty at first; afterwards everything is as it was.

    mergekit's caches answer with files that have been replaced since: open models by their reference, inferred
    architectures by models and options.
    """
    with _lock:
        cache = LoaderCache()
        loaders, settings = dict(LoaderCache.loaders), {name: getattr(cache, name) for name in _SETTINGS}
        LoaderCache.loaders.clear()
        infer_architecture_info.cache_clear()
        cache.setup(options=options)
        try:
            yield cache
        finally:
            for loader in LoaderCache.loaders.values():
                if isinstance(loader, Loader):
                    loader.close()
            LoaderCache.loaders.clear()
            LoaderCache.loaders.update(loaders)
            infer_architecture_info.cache_clear()
            for name, value in settings.items():
                setattr(cache, name, value)


def offer_names(reference: ModelReference, names: Mapping[str, object]) -> None:
    """Let mergekit's planner see these tensor names instead of opening, or downloading, a model."""
    index = ShardedTensorIndex("", True, dict.fromkeys(names, ""), [])
    LoaderCache.loaders[reference] = LazyTensorLoader(index)


@contextmanager
def merging_stages_by(run: Callable[..., None]) -> Iterator[None]:
    """Let mergekit-multi make each of its merges by another function than ``mergekit.merge.run_merge``."""
    with _lock:
        module: Any = multimerge
        own, module.run_merge = module.run_merge, run
        try:
            yield
        finally:
            module.run_merge = own


@contextmanager
def quiet_tokenizers() -> Iterator[None]:
    """Keep the progress bar away that building a tokenizer draws, and that no option of mergekit's switches off."""
    with _lock:
        module: Any = tokenizer_build
        own = module.tqdm
        module.tqdm = types.SimpleNamespace(tqdm=lambda iterable, **_: iterable)
        try:
            yield
        finally:
            module.tqdm = own


def output_config(
    config: MergeConfiguration, architecture: ModelArchitecture, trust_remote_code: bool
) -> PretrainedConfig:
    """Return the config.json that a merge writes, but for dtype and the size of an aligned vocabulary.

    Without a base model, it is that of an arbitrary model of the recipe.
    """
    # Setting the dtype in a config makes transformers print a warning, and no tensor depends on it.
    without_dtype = config.model_copy(update={"dtype": None, "out_dtype": None})
    return _model_out_config(without_dtype, architecture, trust_remote_code)


def resize_vocabulary(
    settings: PretrainedConfig,
    architecture: ModelArchitecture,
    tokenizer: PreTrainedTokenizerBase,
    config: MergeConfiguration,
) -> None:
    """Write the size of an aligned vocabulary to the output's config, padded as the recipe says."""
    padding = None if config.tokenizer is None else config.tokenizer.pad_to_multiple_of
    _update_config_vocab(settings, architecture, tokenizer, pad_to_multiple_of=padding)


def write_companions(
    config: MergeConfiguration,
    architecture: ModelArchitecture,
    options: MergeOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> Exception | None:
    """Write what a merge puts beside weights and config: tokenizer, chat template and settings of generation.

    Args:
        config: The recipe.
        architecture: mergekit's description of the models.
        options: The merge's options.
        tokenizer: The aligned tokenizer, if the recipe asks for one.
        folder: Where to.

    Returns:
        Why there is no tokenizer, where mergekit logs this and goes on.
    """
    failure = None
    if tokenizer is not None:
        _set_chat_template(tokenizer, config)
        tokenizer.save_pretrained(str(folder))
    elif options.copy_tokenizer:
        try:
            _copy_tokenizer(config, str(folder), options=options)
        except Exception as error:  # mergekit's own clause
            failure = error
    _copy_tagalong_files(config, str(folder), files=architecture.tagalong_files or [], options=options)
    return failure


def write_code(
    config: MergeConfiguration, architecture: ModelArchitecture, options: MergeOptions, folder: Path
) -> None:
    """Write the code that transformers saves with a config whose class is the model's own; it loads it if trusted."""
    if not options.trust_remote_code:
        return
    settings = output_config(config, architecture, options.trust_remote_code)
    if type(settings)._auto_class is not None:
        settings.save_pretrained(folder)
        (folder / "config.json").unlink()


def lora_folder(cache: str, model: ModelPath, lora: ModelPath) -> Path:
    """Return where mergekit keeps the merge of an adapter into a model (``ModelReference.merged``)."""
    names = (path._unique_id() for path in (model, lora))  # type: ignore[no-untyped-call]  # mergekit has no types
    return Path(cache, "_".join(names))


def chat_template_names() -> list[str]:
    """Return the names of the chat templates that mergekit brings."""
    files = [entry.name for entry in importlib.resources.files(chat_templates).iterdir()]
    return sorted(name.removesuffix(".jinja") for name in files if not name.startswith("_"))
