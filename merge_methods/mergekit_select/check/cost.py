"""What a merge will take: bytes read and written, memory, and whether there is as much."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mergekit_select import kinds
from mergekit_select.check.merge import DescribedTensor, MergeUnderCheck
from mergekit_select.findings import Cost
from mergekit_select.inputs.files import WEIGHTS
from mergekit_select.methods import OWN

_BYTES_A_NAME = 512  # of a tensor, in a header and the index
_CARD = 64 << 10  # README.md and mergekit_config.yml
_OWN_BUFFERS = 64 << 20  # bytes that selection and resampling take at most beside inputs and result


def add_cost(merge: MergeUnderCheck, written: Sequence[DescribedTensor], unknown: int, out: str | None) -> None:
    """Set what the merge will take, and compare it with what there is.

    Args:
        merge: Gets cost and findings.
        written: What it writes, as far as it is known.
        unknown: How many tensors it writes beside them.
        out: Where, if that is known.
    """
    size = sum(tensor.tensor.nbytes for tensor in written)
    largest = max(written, key=lambda tensor: tensor.inputs + tensor.tensor.nbytes, default=None)
    peak = None
    if largest is not None:
        # mergekit keeps results until a shard is full, and writes it without another copy.
        shard = merge.options.out_shard_size
        buffers = _OWN_BUFFERS if merge.method.spec.name in OWN else 0
        peak = (size if shard <= 0 else min(size, shard)) + largest.inputs + largest.tensor.nbytes + buffers
    merge.cost = Cost(
        merge=merge.name,
        bytes_read=sum(tensor.read for tensor in written),
        bytes_written=size,
        bytes_free=None if out is None else _free(Path(out)),
        peak_memory=peak,
        peak_tensor=None if largest is None else largest.name,
        tensors=len(written) + unknown,
        unknown=unknown,
    )
    _compare(merge, merge.cost, str(out), _small_files(merge, len(written)))


def _small_files(merge: MergeUnderCheck, tensors: int) -> int:
    """Return at most how many bytes mergekit writes beside the tensors: headers, index, config, card and copies."""
    donor = merge.donor.checkpoint.folder
    copied = sum(path.stat().st_size for path in donor.iterdir() if path.is_file() and not WEIGHTS.fullmatch(path.name))
    return copied + tensors * _BYTES_A_NAME + _CARD


def _compare(merge: MergeUnderCheck, cost: Cost, out: str, small: int) -> None:
    if cost.bytes_free is not None and cost.bytes_written + small > cost.bytes_free:
        value = f"{size_text(cost.bytes_written + small)} to write, {size_text(cost.bytes_free)} free"
        merge.findings.add(kinds.DISK_FULL, out, value)
    installed = _memory()
    on_cpu = (merge.options.device or "cpu") == "cpu"
    if on_cpu and installed is not None and cost.peak_memory is not None and cost.peak_memory > installed:
        value = f"{size_text(cost.peak_memory)} expected, {size_text(installed)} installed"
        merge.findings.add(kinds.MEMORY, f"tensor {cost.peak_tensor}", value)


def size_text(count: int) -> str:
    """Return a number of bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _free(out: Path) -> int | None:
    existing = next((parent for parent in (out, *out.absolute().parents) if os.path.exists(parent)), None)
    return None if existing is None else shutil.disk_usage(existing).free


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None
