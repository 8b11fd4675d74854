"""Check the output folder, and describe the output for other merges of the same file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_select import kinds
from mergekit_select.check.merge import DescribedTensor, MergeUnderCheck
from mergekit_select.findings import Findings, some
from mergekit_select.inputs.checkpoint import Checkpoint
from mergekit_select.inputs.files import (
    INDEXES,
    RECIPE,
    RECORDS,
    TOKENIZER_FILES,
    TRANSFORMERS_LOADS,
    WEIGHTS,
    read_json,
)
from mergekit_select.inputs.leftovers import leftovers
from mergekit_select.planner.plan import Plan
from mergekit_select.planner.writing import filled

MOST_NAME_BYTES = 255  # of a file or folder, on nearly all file systems


def check_out(merge: MergeUnderCheck, out: str, written: Sequence[DescribedTensor]) -> None:
    """Add what is wrong with the output folder.

    Args:
        merge: The merge; gets the findings.
        out: The folder, as given.
        written: What the merge writes to it.
    """
    folder = Path(out)
    if out.endswith(("/", os.sep)) and merge.options.write_model_card:
        merge.findings.add(kinds.OUT_NAME, out, name=out.rstrip("/"))
    if os.path.islink(folder) and not os.path.exists(folder):
        merge.findings.add(kinds.OUT_NOT_WRITABLE, out, what="a link that leads nowhere")
        return
    existing = next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "a folder that cannot" if existing.is_dir() else "a file"
        merge.findings.add(kinds.OUT_NOT_WRITABLE, str(existing), what=what)
        return
    if max(len(os.fsencode(part)) for part in folder.absolute().parts) > MOST_NAME_BYTES:
        merge.findings.add(kinds.OUT_NOT_WRITABLE, out, what="a name that is too long")
        return
    for name, inside in _inputs(merge):
        if inside.resolve() == folder.resolve():
            merge.findings.add(kinds.OUT_IS_INPUT, out, name)
            return
    if not folder.is_dir():
        return
    if (folder / RECORDS[0]).exists():
        merge.findings.add(kinds.OUT_RECORDED, out, name=RECORDS[0])
    for path in leftovers(folder):
        merge.findings.add(kinds.OUT_TEMPORARY, str(path))
    shards = [*filled(written, merge.options.out_shard_size, lambda tensor: tensor.tensor.nbytes)]
    _stale(folder, max(1, len(shards)), merge.options, merge.findings)


def _inputs(merge: MergeUnderCheck) -> Iterator[tuple[object, Path]]:
    """Yield every folder that the merge reads: models, those that give a tokenizer only, adapters and their cache."""
    for reference, model in merge.models.items():
        yield model, model.checkpoint.folder
        if reference.lora is not None:
            yield reference.lora, Path(reference.lora.path)
            if merge.options.lora_merge_cache:
                yield "--lora-merge-cache", Path(merge.options.lora_merge_cache)


def _stale(folder: Path, shards: int, options: MergeOptions, findings: Findings) -> None:
    """Add weights that are there: they may be loaded in place of the new ones, stay beside them, or be overwritten."""
    there = sorted(file.name for file in folder.iterdir() if WEIGHTS.fullmatch(file.name) or file.name in INDEXES)
    stem, suffix = ("model", "safetensors") if options.safe_serialization else ("pytorch_model", "bin")
    single, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
    parts = [f"{stem}-{number:05d}-of-{shards:05d}.{suffix}" for number in range(1, shards + 1)]
    new = {single} if shards == 1 else {index, *parts}
    written_first = single if shards == 1 else index
    # transformers takes the first of its list; mergekit an index before a single file.
    before = TRANSFORMERS_LOADS[: TRANSFORMERS_LOADS.index(written_first)]
    hidden = [name for name in before if name in there]
    if shards == 1 and index in there:
        hidden.append(index)
    if hidden:
        findings.add(kinds.OUT_STALE, str(folder), some(hidden))
    elif stay := [name for name in there if name not in new]:
        findings.add(kinds.OUT_LEFTOVERS, str(folder), some(stay))
    elif there and not (folder / RECIPE).exists():
        findings.add(kinds.OUT_OVERWRITTEN, str(folder), some(there))


def described_output(
    merge: MergeUnderCheck, plan: Plan, written: Sequence[DescribedTensor], folder: Path
) -> Checkpoint:
    """Describe the result for the merges of the same file that need it, in an empty folder."""
    assert merge.name is not None  # only a named merge is needed by another
    plan.out_config.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        if (merge.donor.checkpoint.folder / file).exists():
            (folder / file).write_bytes((merge.donor.checkpoint.folder / file).read_bytes())
    (folder / RECIPE).write_text(merge.config.to_yaml(), encoding="utf-8")
    tensors = {tensor.name: tensor.tensor for tensor in written}
    return Checkpoint(merge.name, folder, read_json(folder / "config.json"), tensors, frozenset(), plain=False)
