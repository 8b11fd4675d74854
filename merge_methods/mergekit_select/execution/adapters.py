"""Where adapters are merged: in a folder of the cache that is of their bytes.

mergekit takes what lies in its cache under an adapter's path, whatever the adapter was when that was made.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from mergekit.common import ModelPath
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_select.inputs.files import state
from mergekit_select.inputs.hub import read_revision
from mergekit_select.inputs.references import references


def with_own_cache(config: MergeConfiguration, options: MergeOptions) -> MergeOptions:
    """Return options whose LoRA merge cache is of the adapters and models as they are now; without adapters, the same.

    Every process of a merge gets the same folder, and so does the same command later.

    Raises:
        UnreadableError: A file cannot be read, or the hub cannot be asked.
    """
    found = [reference for _, reference in references(config) if reference.lora is not None]
    cache = options.lora_merge_cache or options.transformers_cache
    if not found or cache is None:
        return options
    parts = {part for reference in found for part in (reference.model, reference.lora) if part is not None}
    known = [sorted((str(part), _identity(part, options)) for part in parts), options.lora_merge_dtype]
    name = f"mergekit-select-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]}"
    return options.model_copy(update={"lora_merge_cache": str(Path(cache, name))})


def _identity(part: ModelPath, options: MergeOptions) -> object:
    """Return what changes when a model or adapter does: the states of its files, or its commit."""
    if not os.path.isdir(part.path):
        return read_revision(part.path, part.revision, options.transformers_cache).commit
    return [[path.name, *state(path)] for path in sorted(Path(part.path).iterdir()) if path.is_file()]
