"""Find every model that a recipe names, and describe each without reading a tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel

from mergekit_select.checkpoints import TOKENIZER_FILES, Checkpoint, open_folder, read_json, read_shard
from mergekit_select.findings import Findings, some
from mergekit_select.hub import is_hub_id, is_pinned, open_hub, write_index
from mergekit_select.safetensors_header import CheckpointError, Tensor

_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings of peft's under which the matrices have other shapes, or belong to other modules.
_OTHER_SHAPES = ("use_qalora", "use_bdlora", "layer_replication", "target_parameters", "megatron_config")


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


def references(value: object, place: str = "") -> Iterator[tuple[str, ModelReference]]:
    """Yield every model reference in a part of a recipe, with its recipe key."""
    if isinstance(value, ModelReference):
        yield place.removeprefix("."), value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from references(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from references(item, f"{place}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from references(item, f"{place}[{number}]")


def with_stand_ins(value: Any, models: Mapping[ModelReference, Model]) -> Any:
    """Return a copy of a part of a recipe in which mergekit finds every model locally."""
    if isinstance(value, ModelReference):
        return models[value].stand_in
    if isinstance(value, BaseModel):
        changes = {name: with_stand_ins(getattr(value, name), models) for name in type(value).model_fields}
        return value.model_copy(update=changes)
    if isinstance(value, Mapping):
        return {name: with_stand_ins(item, models) for name, item in value.items()}
    if isinstance(value, list):
        return [with_stand_ins(item, models) for item in value]
    return value


class ModelOpener:
    """Opens models once each; what the hub gives lies in a folder of the caller's.

    Args:
        options: The merge's options.
        scratch: An empty folder for descriptions of models that mergekit could not plan with where they are.
        outputs: Models that do not exist yet, since another merge of the file writes them, by name.
    """

    def __init__(self, options: MergeOptions, scratch: Path, outputs: Mapping[str, Checkpoint | None]) -> None:
        self.options = options
        self.scratch = scratch
        self.outputs = outputs
        self._count = 0

    def open_all(
        self, config: MergeConfiguration, findings: Findings, progress: Callable[[str], None]
    ) -> dict[ModelReference, Model] | None:
        """Return all models of a recipe in its order, or None where one is unusable, with the reason added."""
        places: dict[ModelReference, list[str]] = {}
        for place, reference in references(config):
            places.setdefault(reference, []).append(place)
        result = {}
        for reference, keys in places.items():
            progress(str(reference))
            model = self._open(reference, tuple(keys), findings)
            if model is not None:
                result[reference] = model
        return result if len(result) == len(places) else None

    def _open(self, reference: ModelReference, places: tuple[str, ...], findings: Findings) -> Model | None:
        place = places[0]
        path = reference.model.path
        if path in self.outputs:
            checkpoint = self.outputs[path]
            if checkpoint is None:
                message = f"what the merge {path} of this file writes is not known, and this one needs it"
                findings.note("not-known", place, path, message, "see what is said of that merge")
        else:
            checkpoint = self._open_path(reference.model, place, findings)
        if checkpoint is not None and reference.lora is not None:
            checkpoint = self._with_lora(reference, checkpoint, place, findings)
        if checkpoint is None:
            return None
        stand_in = reference
        if not checkpoint.plain:
            stand_in = ModelReference(
                model=ModelPath(path=str(self._stand_in(checkpoint))),
                override_architecture=reference.override_architecture,
            )
        return Model(reference, stand_in, checkpoint, places)

    def _open_path(self, model: ModelPath, place: str, findings: Findings) -> Checkpoint | None:
        path = model.path
        if os.path.exists(path):
            if self.options.write_model_card and path[0] not in "/~" and is_hub_id(path):
                self._like_hub_id(path, place, findings)
            return open_folder(str(model), Path(path), place, findings)
        if not is_hub_id(path):
            message = "there is no such folder here, and it is no id of a model on the hub"
            findings.error("model-missing", place, path, message, "correct the path; relative ones count from here")
            return None
        if not is_pinned(model.revision):
            findings.warning(
                "hub-id-not-pinned",
                place,
                str(model),
                "a hub id must name a commit for everybody to get the same bits, and branches and tags can move",
                "write owner/name@<commit hash>",
            )
        folder = self._folder()
        return open_hub(path, model.revision, folder, place, findings, self.options.transformers_cache)

    def _like_hub_id(self, path: str, place: str, findings: Findings) -> None:
        from huggingface_hub import constants

        add = findings.error if constants.HF_HUB_OFFLINE else findings.warning
        add(
            "local-path-like-hub-id",
            place,
            path,
            "a local path must begin with ./ or / for mergekit not to ask the hub about it when it writes the model "
            "card; offline that fails after the merge",
            f"write ./{path}",
        )

    def _with_lora(
        self, reference: ModelReference, base: Checkpoint, place: str, findings: Findings
    ) -> Checkpoint | None:
        lora = reference.lora
        assert lora is not None  # the caller has looked
        adapter = Path(lora.path)
        if adapter.exists():
            if self.options.write_model_card and lora.path[0] not in "/~" and is_hub_id(lora.path):
                self._like_hub_id(lora.path, place, findings)
            if not (adapter / "adapter_config.json").exists():
                message = f"a LoRA adapter must be a folder with adapter_config.json, and {adapter} has none"
                findings.error("model-missing", place, str(reference), message, "correct the path after the +")
                return None
        elif not is_hub_id(lora.path):
            message = "there is no such adapter folder here, and it is no id of one on the hub"
            findings.error("model-missing", place, lora.path, message, "correct the path after the +")
            return None
        elif not is_pinned(lora.revision):
            message = "a hub id must name a commit for everybody to get the same bits"
            findings.warning("hub-id-not-pinned", place, str(lora), message, "write owner/name@<commit hash>")
        cache = self.options.lora_merge_cache
        if not cache:
            findings.error(
                "lora-cache",
                place,
                str(reference),
                "mergekit merges a LoRA adapter into its model first, and needs a folder for the result",
                "give --lora-merge-cache FOLDER",
            )
            return None
        name = str(reference)
        merged = lora_folder(cache, reference.model, lora)
        if not merged.exists():
            if adapter.exists() and not _adapter_fits(adapter, name, base, place, findings):
                return None
            # Merging an adapter keeps names and shapes.
            return replace(base, name=name, files=frozenset({(name, "to be merged")}), plain=False)
        problems = Findings()
        opened = open_folder(name, merged, place, problems)
        if opened is None:
            findings.error(
                "lora-cache-stale",
                place,
                str(merged),
                "mergekit takes any folder in the LoRA merge cache for a finished merge, and this one is not",
                "remove the folder",
            )
            return None
        if adapter.exists() and _newest(adapter) > _newest(merged):
            findings.warning(
                "lora-cache-stale",
                place,
                str(merged),
                "mergekit takes the adapter's earlier merge from the LoRA merge cache, and the adapter is newer",
                "remove the folder",
            )
        return replace(opened, config=base.config, folder=base.folder, plain=False)

    def _stand_in(self, checkpoint: Checkpoint) -> Path:
        """A folder with config, tokenizer and an index of names, but no weights."""
        folder = self._folder()
        for file in TOKENIZER_FILES:
            if (checkpoint.folder / file).exists():
                shutil.copy(checkpoint.folder / file, folder / file)
        (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)))
        write_index(folder, checkpoint.tensors or {})
        return folder

    def _folder(self) -> Path:
        self._count += 1
        folder = self.scratch / f"model-{self._count}"
        try:
            folder.mkdir()
        except OSError as error:
            raise CheckpointError(f"cannot write to the temporary folder {folder}: {error.strerror}") from error
        return folder


def lora_folder(cache: str, model: ModelPath, lora: ModelPath) -> Path:
    """Where mergekit keeps the merge of an adapter into a model (``ModelReference.merged``)."""
    names = (path._unique_id() for path in (model, lora))  # type: ignore[no-untyped-call]  # mergekit has no types
    return Path(cache, "_".join(names))


def _newest(folder: Path) -> float:
    return max((file.stat().st_mtime for file in folder.iterdir()), default=0.0)


def _adapter_fits(adapter: Path, name: str, base: Checkpoint, place: str, findings: Findings) -> bool:
    """Whether peft could merge a local adapter into a model, as far as config and shapes tell."""
    try:
        config = read_json(adapter / "adapter_config.json")
        weights = [adapter / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
        stored = next((file for file in weights if file.exists()), None)
        if stored is None:
            message = f"a LoRA adapter must have its weights in adapter_model.safetensors, and {adapter} has none"
            findings.error("model-missing", place, name, message, "copy or download the adapter again")
            return False
        tensors = read_shard(stored)
    except CheckpointError as error:
        findings.error("model-unreadable", place, name, str(error), "copy or download the adapter again")
        return False
    kind, rank = config.get("peft_type"), config.get("r", 8)  # 8 is peft's default
    problems = []
    if not isinstance(kind, str):
        problems.append(("peft_type", "adapter_config.json must name a peft_type", repr(kind)))
    elif kind == "LORA" and (type(rank) is not int or rank <= 0):
        problems.append(("r", "the rank r in adapter_config.json must be a positive whole number", repr(rank)))
    elif kind != "LORA" or any(config.get(key) for key in _OTHER_SHAPES) or base.tensors is None:
        message = "whether peft can merge this kind of adapter into the model is not known without doing it"
        findings.note("not-known", place, name, message, "see that the adapter was trained on this model")
    else:
        unknown = []
        for key, tensor in tensors.items():
            problem = _lora_tensor(key, tensor, config, base)
            if problem is None:
                unknown.append(key)
            elif problem:
                problems.append((key, problem, str(list(tensor.shape))))
        if unknown or not tensors:
            message = "whether these tensors of the adapter fit the model is not known without merging them"
            findings.note(
                "not-known", f"{place}, {some(unknown)}", name, message, "see that it was trained on this model"
            )
    for key, problem, value in problems[:1]:
        more = f", and {len(problems) - 1} more like it" if len(problems) > 1 else ""
        remedy = "give an adapter that was trained on this model, with its own adapter_config.json"
        findings.error("lora-invalid", f"{place}, {key}", value, f"{problem}{more}", remedy)
    return not problems


def _lora_tensor(key: str, tensor: Tensor, config: Mapping[str, Any], base: Checkpoint) -> str | None:
    """Say why a LoRA matrix does not fit the model; empty if it does, None where that is not known."""
    match = _LORA.fullmatch(key)
    weight = (base.tensors or {}).get(f"{match['module']}.weight") if match else None
    targets = config.get("target_modules")
    if match is None or weight is None or len(weight.shape) != 2 or len(tensor.shape) != 2:
        return None
    module, side = match["module"], match["side"]
    listed = isinstance(targets, list) and any(module == end or module.endswith(f".{end}") for end in targets)
    try:
        rank = _rank(module, config)
    except re.error:
        return None
    if listed and tensor.shape[0 if side == "A" else 1] != rank:
        return f"lora_{side} must have the rank that adapter_config.json gives its module, which is {rank}"
    length = tensor.shape[1 if side == "A" else 0]
    expected, swapped = (weight.shape[1], weight.shape[0]) if side == "A" else weight.shape
    if length == expected:
        return ""
    if length == swapped:  # some models store weights transposed, with or without fan_in_fan_out
        return "" if config.get("fan_in_fan_out") else None
    return f"lora_{side} must fit the model's {module}.weight of shape {list(weight.shape)}" if listed else None


def _rank(module: str, config: Mapping[str, Any]) -> object:
    """The rank that peft gives a module: the first pattern that ends its name, else r."""
    patterns = config.get("rank_pattern")
    for pattern, rank in (patterns if isinstance(patterns, dict) else {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return rank
    return config.get("r", 8)
