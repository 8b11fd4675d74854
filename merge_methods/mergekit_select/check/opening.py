"""Find every model that a recipe names, describe each once, and add what is wrong with it alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from mergekit.common import ModelPath, ModelReference

from mergekit_select import kinds
from mergekit_select.check.merge import MergeUnderCheck, Model
from mergekit_select.errors import UnreadableError
from mergekit_select.findings import Kind, UnusableModelError, some
from mergekit_select.inputs.checkpoint import Checkpoint, read_checkpoint
from mergekit_select.inputs.files import TOKENIZER_FILES
from mergekit_select.inputs.hub import is_hub_id, is_pinned, offline, read_hub_model, write_index
from mergekit_select.inputs.lora import fit, newest_change, read_adapter
from mergekit_select.inputs.references import references
from mergekit_select.planner.internals import lora_folder

# Up to Python 3.12 a subclass of Unpickler could override persistent_load, as mergekit's lazy one does; from 3.13 on
# the attribute that torch sets wins, and mergekit gets whole storages in place of its deferred loads.
_LAZY_UNPICKLE_WORKS = sys.version_info < (3, 13)


def open_models(
    merge: MergeUnderCheck,
    scratch: Path,
    outputs: Mapping[str, Checkpoint | None],
    progress: Callable[[str], None],
) -> bool:
    """Describe all models of a merge; return whether all can be used.

    Args:
        merge: Gets the models, and the findings.
        scratch: An empty folder for descriptions of models that mergekit could not plan with where they are.
        outputs: Models that do not exist yet, since another merge of the file writes them, by name.
        progress: Called with each model's name before it is looked at.
    """
    places: dict[ModelReference, list[str]] = {}
    for place, reference in references(merge.config):
        places.setdefault(reference, []).append(place)
    for number, (reference, keys) in enumerate(places.items()):
        progress(str(reference))
        folder = scratch / f"model-{number}"
        try:
            folder.mkdir()
        except OSError as error:
            raise UnreadableError(f"cannot write to the temporary folder {folder}: {error.strerror}") from error
        checkpoint = _Opener(merge, keys[0], folder, outputs).open(reference)
        if checkpoint is not None:
            stand_in = reference if checkpoint.plain else _stand_in(reference, checkpoint, folder)
            merge.models[reference] = Model(reference, stand_in, checkpoint, tuple(keys))
    return len(merge.models) == len(places)


def _stand_in(reference: ModelReference, checkpoint: Checkpoint, folder: Path) -> ModelReference:
    """Leave config, tokenizer and an index of names, but no weights, in a folder, and refer to it."""
    for file in TOKENIZER_FILES:
        if (checkpoint.folder / file).exists() and checkpoint.folder != folder:
            shutil.copy(checkpoint.folder / file, folder / file)
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    write_index(folder, checkpoint.tensors or {})
    return ModelReference(model=ModelPath(path=str(folder)), override_architecture=reference.override_architecture)


class _Opener:
    """Opens one model."""

    def __init__(
        self, merge: MergeUnderCheck, place: str, folder: Path, outputs: Mapping[str, Checkpoint | None]
    ) -> None:
        self.options = merge.options
        self.findings = merge.findings
        self.place = place
        self.folder = folder
        self.outputs = outputs

    def open(self, reference: ModelReference) -> Checkpoint | None:
        """Return the model's description, or None with the reason added."""
        path = reference.model.path
        if path in self.outputs:
            checkpoint = self.outputs[path]
            if checkpoint is None:
                self.findings.add(kinds.OUTPUT_NOT_KNOWN, self.place, path, name=path)
                return None
        else:
            try:
                checkpoint = self._open_path(reference.model)
            except UnusableModelError as error:
                value = path if error.kind is kinds.MODEL_ABSENT else reference.model
                self.findings.add(error.kind, self.place, value, **error.details)
                return None
        return checkpoint if reference.lora is None else self._with_lora(reference, reference.lora, checkpoint)

    def _open_path(self, model: ModelPath) -> Checkpoint:
        path = model.path
        if os.path.exists(path):  # pathlib's raises for a name that is too long
            self._warn_of_hub_id(path)
            checkpoint = read_checkpoint(str(model), Path(path))
        elif not is_hub_id(path):
            raise UnusableModelError(kinds.MODEL_ABSENT)
        else:
            self._warn_of_branch(model)
            checkpoint = read_hub_model(path, model.revision, self.folder, self.options.transformers_cache)
        if checkpoint.ambiguous is not None:
            index, single = checkpoint.ambiguous
            folder = checkpoint.folder
            self.findings.add(kinds.MODEL_AMBIGUOUS, self.place, model, folder=folder, index=index, single=single)
        if checkpoint.pickle is not None:
            kind = kinds.MODEL_PICKLED if checkpoint.pickle else kinds.HUB_PICKLED
            self.findings.add(kind, self.place, model, file=checkpoint.pickle)
            if self.options.lazy_unpickle and not _LAZY_UNPICKLE_WORKS:
                self.findings.add(kinds.LAZY_UNPICKLE, self.place, "--lazy-unpickle", model=model)
        return checkpoint

    def _warn_of_hub_id(self, path: str) -> None:
        """Warn of a local path that mergekit takes for a hub id when it writes the model card."""
        if self.options.write_model_card and path[0] not in "/~" and is_hub_id(path):
            kind = kinds.LOCAL_PATH_LIKE_HUB_ID_OFFLINE if offline() else kinds.LOCAL_PATH_LIKE_HUB_ID
            self.findings.add(kind, self.place, path, path=path)

    def _warn_of_branch(self, model: ModelPath) -> None:
        if not is_pinned(model.revision):
            self.findings.add(kinds.HUB_ID_NOT_PINNED, self.place, model)

    def _with_lora(self, reference: ModelReference, lora: ModelPath, base: Checkpoint) -> Checkpoint | None:
        adapter = Path(lora.path)
        if os.path.exists(adapter):
            self._warn_of_hub_id(lora.path)
            if not (adapter / "adapter_config.json").exists():
                return self._refuse(kinds.ADAPTER_WITHOUT_CONFIG, reference, adapter=adapter)
        elif not is_hub_id(lora.path):
            return self._refuse(kinds.ADAPTER_ABSENT, lora.path)
        else:
            self._warn_of_branch(lora)
        cache = self.options.lora_merge_cache
        if not cache:
            return self._refuse(kinds.LORA_CACHE, reference)
        merged = lora_folder(cache, reference.model, lora)
        if not merged.exists():
            if os.path.exists(adapter) and not self._fits(adapter, reference, base):
                return None
            # Merging an adapter keeps names and shapes.
            name = str(reference)
            return replace(base, name=name, files=frozenset({(name, "to be merged")}), plain=False)
        try:
            opened = read_checkpoint(str(reference), merged)
        except UnusableModelError:
            return self._refuse(kinds.LORA_CACHE_UNFINISHED, merged)
        if os.path.exists(adapter) and newest_change(adapter) > newest_change(merged):
            self.findings.add(kinds.LORA_CACHE_OLDER, self.place, merged)
        return replace(opened, config=base.config, folder=base.folder, plain=False)

    def _fits(self, folder: Path, reference: ModelReference, base: Checkpoint) -> bool:
        """Whether peft could merge a local adapter into a model, as far as config and shapes tell."""
        try:
            answer = fit(read_adapter(folder), base)
        except UnusableModelError as error:
            self.findings.add(error.kind, self.place, reference, **error.details)
            return False
        if not answer.kind_known:
            self.findings.add(kinds.LORA_KIND_NOT_KNOWN, self.place, reference)
        if answer.unknown:
            self.findings.add(kinds.LORA_TENSORS_NOT_KNOWN, f"{self.place}, {some(answer.unknown)}", reference)
        for key, problem, value in answer.problems[:1]:
            more = len(answer.problems) - 1
            text = f"{problem}, and {more} more like it" if more else problem
            self.findings.add(kinds.LORA_INVALID, f"{self.place}, {key}", value, problem=text)
        return not answer.problems

    def _refuse(self, kind: Kind, value: object, **details: object) -> Checkpoint | None:
        self.findings.add(kind, self.place, value, **details)
        return None
