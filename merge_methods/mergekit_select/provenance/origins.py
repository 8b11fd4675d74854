"""A merge that is to be made again: what it was made from, where that is now, and what making it would take."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from mergekit.options import MergeOptions

from mergekit_select import kinds
from mergekit_select.errors import UnreadableError
from mergekit_select.findings import Findings, UnusableModelError
from mergekit_select.inputs.digests import Digests, folder_files
from mergekit_select.inputs.files import RECIPE
from mergekit_select.inputs.hub import hub_errors, is_pinned, offline, read_revision
from mergekit_select.inputs.recipe import read_text
from mergekit_select.provenance.documents import STATEMENT, TENSORS, read_definition
from mergekit_select.provenance.locking import file_differences, lock, notes, version_notes
from mergekit_select.provenance.parents import Parent
from mergekit_select.provenance.recording import added, changes, read_record, versions
from mergekit_select.provenance.sources import obtained
from mergekit_select.provenance.statement import MOST_BYTES, BuildDefinition, Statement, TensorTable

_DOWNLOAD_RATE = 50e6  # bytes a second, for the estimate: a good line to a hub
_MERGE_RATE = 300e6  # bytes read and written a second, for the estimate: an ordinary disk


@dataclass(frozen=True)
class Origin:
    """What is known of a merge that is to be made again.

    Attributes:
        target: As it was called.
        definition: What it was made from; without a record, what its recipe names now.
        tensors: What came out; None where that is not recorded.
        recorded: Whether there is a record or lock.
        folder: Where the merge itself lies, or can be downloaded to; None for a lock.
    """

    target: str
    definition: BuildDefinition
    tensors: TensorTable | None
    recorded: bool
    folder: Path | None


@dataclass(frozen=True)
class Needs:
    """What making a merge again would take.

    Attributes:
        download: Bytes that are not in the cache yet.
        read: Bytes of weights.
        written: Bytes of the output; None where they are not known.
        seconds: A rough estimate.
    """

    download: int
    read: int
    written: int | None
    seconds: float


def read_origin(target: str, options: MergeOptions, digests: Digests, findings: Findings) -> Origin:
    """Read what a merge was made from; of a model on a hub, only its record, recipe and card are downloaded.

    Args:
        target: A lock, a folder, or OWNER/NAME[@REVISION].
        options: For where the cache is.
        digests: Remembers what was hashed.
        findings: Receives what cannot be known, and what of it is not as recorded.

    Raises:
        UnreadableError: It cannot be read, or says nothing of how it was made.
    """
    if os.path.isfile(target):
        definition = read_definition(Path(target))
        findings += version_notes(definition)
        return Origin(target, definition, None, True, None)
    folder = obtained(target, options, [STATEMENT, TENSORS, RECIPE, "config.json"])
    kept = read_record(folder)
    if kept is not None:
        made = kept[0].predicate.run_details.builder.version
        for package, version in sorted(versions().items()):
            if made.get(package, version) != version:
                findings.add(kinds.VERSION_DIFFERS, package, version, package=package, expected=made[package])
        findings += _other_files(target, folder, kept[0], options, digests)
        return Origin(target, kept[0].definition, kept[1], True, folder)
    recipe = folder / RECIPE
    if not os.path.exists(recipe):
        raise UnreadableError(f"{target} has neither {STATEMENT} nor {RECIPE}: how it was made cannot be known")
    for what in ("at which commits its models were", "with which options and versions it was merged"):
        findings.add(kinds.NOT_RECORDED, target, what=what)
    return Origin(target, lock(read_text(recipe), target, options, digests=digests), None, False, folder)


def _other_files(target: str, folder: Path, statement: Statement, options: MergeOptions, digests: Digests) -> Findings:
    """Say which files of a merge are not what its record says: the digests of its tensors would then be of others.

    Of a model on a hub, files are compared whose SHA-256 the hub tells, which are the large ones, and those downloaded.
    """
    if os.path.exists(target):
        return changes(folder, statement, digests)
    found = Findings()
    repository, _, _ = target.partition("@")
    hosted = {file.path: file for file in read_revision(repository, folder.name, options.transformers_cache).files}
    for subject in statement.subject:
        expected, file = subject.digest.get("sha256"), hosted.get(subject.name)
        if subject.name == "." or (file is None and offline()):
            continue
        if file is None:
            found.add(kinds.FOLDER_LACKS, subject.name)
            continue
        there = folder / subject.name
        now = file.digest.get("sha256") or (digests.of(there)["sha256"] if os.path.exists(there) else expected)
        if now != expected:
            found.add(kinds.FOLDER_CHANGED, subject.name, now or "", expected=expected)
    found += added(hosted, statement)
    return found


def examine(
    parent: Parent, moved: Mapping[str, str], options: MergeOptions, digests: Digests, findings: Findings
) -> str:
    """Say whether a parent can be had with the recorded bytes, and return what to call it.

    Args:
        parent: As recorded.
        moved: Where models lie now, by what the recipe calls them.
        options: For where the cache is.
        digests: Remembers what was hashed.
        findings: Receives what is in the way.

    Raises:
        UnusableModelError: The hub cannot be asked.
    """
    place = moved.get(parent.reference, parent.reference)
    if parent.commit is None or parent.reference in moved:
        if not os.path.isdir(place):
            findings.add(kinds.PARENT_LOCAL, parent.reference, place, path=parent.path)
        else:
            there = folder_files(Path(place), digests)
            findings += file_differences(parent.reference, parent.files, there, partly=parent.commit is not None)
        return place
    if os.path.exists(parent.path):
        findings.add(kinds.HUB_HIDDEN, parent.reference, path=parent.path)
        return parent.pinned
    try:
        if not offline():
            with hub_errors():
                HfApi().auth_check(parent.path)
        found = read_revision(parent.path, parent.commit, options.transformers_cache, digests)
    except UnusableModelError as error:
        if error.kind == kinds.HUB_GATED:
            findings.add(kinds.PARENT_GATED, parent.reference)
        elif error.kind == kinds.HUB_REFUSES:
            findings.add(kinds.PARENT_MISSING, parent.reference, problem=error.details["problem"])
        elif error.kind == kinds.HUB_REVISION_GONE:
            return _elsewhere(parent, findings)
        else:
            raise
        return parent.pinned
    findings += file_differences(parent.reference, parent.files, found.files, partly=True)
    findings += notes([parent])
    return parent.pinned


def _elsewhere(parent: Parent, findings: Findings) -> str:
    """Look for the bytes of a commit that is gone at the branch that the recipe names, or at the default one."""
    try:
        now = read_revision(parent.path, None if is_pinned(parent.revision) else parent.revision)
    except UnusableModelError as error:
        if error.kind != kinds.HUB_REVISION_GONE:
            raise
        now = read_revision(parent.path, None)
    told = {"commit": parent.commit, "found": f"{parent.path}@{now.commit}"}
    if not file_differences(parent.reference, parent.files, now.model):
        findings.add(kinds.REVISION_REPLACED, parent.reference, **told)
        return f"{parent.path}@{now.commit}"
    findings.add(kinds.REVISION_GONE, parent.reference, revision=told["found"], commit=parent.commit)
    return parent.pinned


def needs(parents: Sequence[Parent], tensors: TensorTable | None, options: MergeOptions) -> Needs:
    """Estimate what a merge would download, read and write."""
    download, read = 0, 0
    for parent in parents:
        names = [file.path for file in parent.files]
        suffix = ".safetensors" if any(name.endswith(".safetensors") for name in names) else ".bin"
        for file in parent.files:
            weights = file.path.endswith(suffix)
            read += file.size if weights else 0
            if parent.commit and (weights or file.path.endswith((".json", "tokenizer.model"))):
                cached = try_to_load_from_cache(
                    parent.path, file.path, cache_dir=options.transformers_cache, revision=parent.commit
                )
                download += 0 if isinstance(cached, str) else file.size
    written = None
    if tensors is not None:
        entries = tensors.tensors.values()
        written = sum(math.prod(entry.shape) * _width(entry.dtype) for entry in entries)
        if written >= MOST_BYTES:
            raise UnreadableError(f"{TENSORS}: tensors must have fewer than 2^63 bytes; get the file again")
    seconds = download / _DOWNLOAD_RATE + (read + (written or 0)) / _MERGE_RATE
    return Needs(download, read, written, seconds)


def require_space(found: Needs, out: Path | None, options: MergeOptions, findings: Findings) -> None:
    """Report disks that are too small."""
    wanted = {Path(options.transformers_cache or constants.HF_HUB_CACHE): found.download}
    if out is not None:
        wanted[out] = wanted.get(out, 0) + (found.written or found.read)
    disks: dict[int, int] = {}
    for place, size in wanted.items():
        there = next(folder for folder in (place, *place.absolute().parents) if os.path.exists(folder))
        disk = os.stat(there).st_dev
        disks[disk] = disks.get(disk, 0) + size  # the cache and the output may lie on one disk
        free = shutil.disk_usage(there).free
        if disks[disk] > free:
            findings.add(kinds.DISK_FULL, str(place), f"{disks[disk]:,} bytes, and {free:,} are free")


def _width(dtype: str) -> int:
    known = getattr(torch, dtype, None)
    if not isinstance(known, torch.dtype):
        raise UnreadableError(f"{TENSORS}: dtype must be one of torch's, got {dtype!r}; get the file again")
    return known.itemsize
