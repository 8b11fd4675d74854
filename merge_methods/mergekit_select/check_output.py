"""Findings about the output folder, and what a merge will take."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit.common import get_config_value
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_select.check_tensors import Output
from mergekit_select.findings import Cost, Findings, some
from mergekit_select.models import Model
from mergekit_select.planning import Plan

_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?")


def check_vocabulary(
    settings: PretrainedConfig, donor: str, plan: Plan, outputs: Sequence[Output], findings: Findings
) -> None:
    """The output's embeddings must have the rows that its config says, or transformers does not load it."""
    key = plan.architecture.vocab_size_config_key or "vocab_size"
    try:
        said = get_config_value(settings, key)
    except (AttributeError, RuntimeError):  # models of other things than text have none
        return
    # Some architectures have a second vocabulary, with a size of its own.
    sizes = {value for config in (settings, settings.get_text_config()) for value in _vocabularies(config)} | {said}
    axes = {planned.name: planned.weight.vocabulary_axis for planned in plan.tensors}
    for output in outputs:
        axis, shape = axes.get(output.name), output.tensor.shape
        if isinstance(said, int) and axis is not None and len(shape) > axis and shape[axis] not in sizes:
            findings.error(
                "config-invalid",
                f"tensor {output.name}",
                f"{key} {said}, {shape[axis]} rows",
                f"the output takes {key} from {donor}, and transformers loads no tensor with other rows",
                f"correct {key} in its config.json, or add tokenizer: {{source: base}}",
            )


def _vocabularies(settings: PretrainedConfig) -> list[object]:
    return [value for name, value in settings.to_dict().items() if "vocab" in name and isinstance(value, int)]


def cost_of(
    name: str | None,
    outputs: Sequence[Output],
    unknown: int,
    out: Path | None,
    options: MergeOptions,
    method_buffers: int,
) -> Cost:
    """Return what a merge will take.

    Args:
        name: Of the merge.
        outputs: What it writes, as far as it is known.
        unknown: How many tensors it writes beside them.
        out: Where.
        options: Its options.
        method_buffers: Bytes that the method needs beside inputs and result, where known.
    """
    written = sum(output.tensor.nbytes for output in outputs)
    largest = max(outputs, key=lambda output: output.inputs + output.tensor.nbytes, default=None)
    peak = None
    if largest is not None:
        # mergekit keeps results until a shard is full, and writes it without another copy.
        held = written if options.out_shard_size <= 0 else min(written, options.out_shard_size)
        peak = held + largest.inputs + largest.tensor.nbytes + method_buffers
    return Cost(
        name,
        sum(output.read for output in outputs),
        written,
        None if out is None else _free(out),
        peak,
        None if largest is None else largest.name,
        len(outputs) + unknown,
        unknown,
    )


def check_room(cost: Cost, out: Path | None, options: MergeOptions, findings: Findings) -> None:
    """Compare what a merge will take with what there is."""
    if cost.bytes_free is not None and cost.bytes_written > cost.bytes_free:
        findings.error(
            "disk-full",
            str(out),
            f"{size(cost.bytes_written)} to write, {size(cost.bytes_free)} free",
            "the output must fit on the disk",
            "free some, or merge into another folder",
        )
    there_is = _memory()
    on_cpu = (options.device or "cpu") == "cpu"
    if on_cpu and there_is is not None and cost.peak_memory is not None and cost.peak_memory > there_is:
        findings.warning(
            "memory",
            f"tensor {cost.peak_tensor}",
            f"{size(cost.peak_memory)} expected, {size(there_is)} installed",
            "the merge is expected to need more memory than there is",
            "give a smaller --out-shard-size, such as 1B",
        )


def check_out(out: str, models: Iterable[Model], shards: int, options: MergeOptions, findings: Findings) -> None:
    """Add what is wrong with the output folder.

    Args:
        out: As given.
        models: The inputs.
        shards: 1 if the output will be one file, else a larger number.
        options: The merge's options.
        findings: Where to add it.
    """
    folder = Path(out)
    if out.endswith(("/", os.sep)) and options.write_model_card:
        message = "mergekit takes the model card's title from the text after the last slash, and there is none"
        findings.note("out-name", out, "", message, f"write {out.rstrip('/')}")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        message = "the output must be a folder that can be written, and this is " + (
            "a folder that cannot" if existing.is_dir() else "a file"
        )
        findings.error("out-not-writable", str(existing), "", message, "give another folder")
        return
    if not folder.is_dir():
        return
    for model in models:
        if model.checkpoint.folder.resolve() == folder.resolve():
            message = "the output must not be one of the inputs: the merge would overwrite it"
            findings.error("out-is-input", out, str(model), message, "give another folder")
            return
    _stale(folder, shards, options, findings)


def _stale(folder: Path, shards: int, options: MergeOptions, findings: Findings) -> None:
    there = sorted(file.name for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name))
    kind = "safetensors" if options.safe_serialization else "bin"
    stem = "model" if options.safe_serialization else "pytorch_model"
    single, index = f"{stem}.{kind}", f"{stem}.{kind}.index.json"
    # transformers loads model.safetensors before its index, and both before pickles; mergekit an index first.
    loaded_first = ["model.safetensors"] if shards > 1 or not options.safe_serialization else []
    if not options.safe_serialization:
        loaded_first.append("model.safetensors.index.json")
        if shards > 1:
            loaded_first.append("pytorch_model.bin")
    hidden = [name for name in loaded_first if name in there and name != (single if shards == 1 else index)]
    if shards == 1 and index in there:
        hidden.append(index)
    if hidden:
        findings.error(
            "out-stale",
            str(folder),
            some(hidden),
            "the folder must not hold weights of an earlier merge: they would be loaded in place of the new ones",
            "remove them, or give another folder",
        )
    elif there and there != [single]:
        message = "weights of an earlier merge stay in the folder beside the new ones"
        findings.warning("out-stale", str(folder), some(there), message, "remove them, or give another folder")


def shard_count(outputs: Sequence[Output], options: MergeOptions) -> int:
    """How many shards mergekit will write, filling them in the order of the plan."""
    count, filled = 1, 0
    for output in outputs:
        if filled and 0 < options.out_shard_size < filled + output.tensor.nbytes:
            count, filled = count + 1, 0
        filled += output.tensor.nbytes
    return count


def size(count: int) -> str:
    """A number of bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _free(out: Path) -> int | None:
    existing = next((parent for parent in (out, *out.absolute().parents) if parent.exists()), None)
    return None if existing is None else shutil.disk_usage(existing).free


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None
