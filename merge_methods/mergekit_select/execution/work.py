"""Compute parts, write each to its place in a file, and record it once it is on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergekit_select.bits import describe, digest, flat_integers
from mergekit_select.errors import PlanError
from mergekit_select.execution.job import Job
from mergekit_select.execution.layout import Part
from mergekit_select.execution.workspace import part_lock, writing
from mergekit_select.inputs.files import forget, sync
from mergekit_select.planner.writing import WrittenTensor, expect


def work(job: Job, parts: Sequence[Part], progress: Callable[[], None] = lambda: None) -> None:
    """Compute those of the parts that nobody has recorded, nor is working on.

    A part is brought to the disk while the next one is computed. Going on after any interruption is calling this again.

    Args:
        job: The merge.
        parts: Which parts.
        progress: Called when a part was recorded.

    Raises:
        MergekitSelectError: A tensor cannot be computed, or not be written.
    """
    with ThreadPoolExecutor(2) as keeper, ThreadPoolExecutor(1) as sealer:
        before: Future[None] | None = None
        for part in parts:
            if not _claim(job, part):
                continue
            try:
                descriptor, digests = _write(job, part, keeper)
            except BaseException:
                job.workspace.release(part_lock(part.number))
                raise
            finally:
                if before is not None:
                    _settle(before, progress)
            before = sealer.submit(_seal, job, part, descriptor, digests)
        if before is not None:
            _settle(before, progress)


def _settle(sealing: Future[None], progress: Callable[[], None]) -> None:
    sealing.result()
    progress()


def _claim(job: Job, part: Part) -> bool:
    workspace = job.workspace
    if part.number in workspace.recorded() or not workspace.acquire(part_lock(part.number)):
        return False
    if part.number in workspace.recorded() or workspace.finished:  # by another process, just now
        workspace.release(part_lock(part.number))
        return False
    return True


def _write(job: Job, part: Part, keeper: Executor) -> tuple[int, dict[str, str]]:
    """Compute a part and write it; return the open file, and the tensors' digests.

    A tensor is hashed and written while the next one's inputs are read, where both fit into the memory that the largest
    tensor needs anyway.
    """
    path = job.workspace.place(part.file.name)
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    digests: dict[str, Future[str]] = {}
    kept: list[Future[Any]] = []  # what is being done with the tensor before
    held = 0  # its bytes
    try:
        if part.tensors[0] is part.file.tensors[0]:
            _put(descriptor, path, memoryview(part.file.header), 0)
        for tensor, after in zip(part.tensors, [*part.tensors[1:], None], strict=True):
            if after is not None:
                expect(after.planned)
            if held + tensor.read + tensor.stored.nbytes > job.layout.peak:
                _take(kept)
            result = _computed(job, tensor)
            _take(kept)
            name, content = tensor.planned.name, flat_integers(result).view(torch.uint8).numpy().data
            digests[name] = keeper.submit(digest, result)
            kept += digests[name], keeper.submit(_put, descriptor, path, content, part.file.starts[name])
            held = result.nbytes
            del result, content  # or they would stay until the next one is computed
        _take(kept)
        job.check_inputs()
    except BaseException:
        wait(kept)
        os.close(descriptor)
        raise
    return descriptor, {name: future.result() for name, future in digests.items()}


def _take(kept: list[Future[Any]]) -> None:
    for future in kept:
        future.result()
    kept.clear()


def _computed(job: Job, tensor: WrittenTensor) -> torch.Tensor:
    result = job.engine.merged(tensor.planned)
    expected = f"{tensor.stored.dtype} {list(tensor.stored.shape)}"
    if result is None or describe(result) != expected:
        came = "nothing" if result is None else describe(result)
        raise PlanError(
            f"tensor {tensor.planned.name!r} was expected to come out as {expected}, and came out as {came}; "
            f"merge this recipe with mergekit-yaml"
        )
    return result


def _put(descriptor: int, path: Path, data: memoryview, start: int) -> None:
    with writing(path):
        while data:
            count = os.pwrite(descriptor, data, start)
            data, start = data[count:], start + count


def _seal(job: Job, part: Part, descriptor: int, digests: dict[str, str]) -> None:
    """Bring a part to the disk, then its file's name, then its record."""
    path = job.workspace.place(part.file.name)
    with writing(path):
        try:
            os.fsync(descriptor)
            forget(descriptor)  # or the output would drive out inputs that are still to be read
        finally:
            os.close(descriptor)
        sync(path.parent)
        job.workspace.record(part.number, job.plan_id, digests)
    job.workspace.release(part_lock(part.number))


def forget_lost(job: Job, rehash: bool = False) -> int:
    """Forget records of parts that are not there any more; return how many.

    Args:
        job: The merge.
        rehash: Whether to read every recorded part again, and compare digests.
    """
    workspace = job.workspace
    done = workspace.recorded()
    lost = [
        part
        for part in job.layout.parts
        if part.number in done
        and (
            not workspace.place(part.file.name).exists()
            or (rehash and stored_digests(workspace.place(part.file.name), part) != workspace.digests(part.number))
        )
    ]
    for part in lost:
        workspace.forget(part.number)
    return len(lost)


def stored_digests(path: Path, part: Part) -> dict[str, str]:
    """Return the digests of a part's tensors, or none where the file is damaged."""
    result = {}
    with path.open("rb") as file:
        if part.tensors[0] is part.file.tensors[0] and file.read(len(part.file.header)) != part.file.header:
            return {}
        for tensor in part.tensors:
            file.seek(part.file.starts[tensor.planned.name])
            content = file.read(tensor.stored.nbytes)
            if len(content) < tensor.stored.nbytes:
                return {}
            data = torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
            typed = data.view(getattr(torch, tensor.stored.dtype)).reshape(tensor.stored.shape)
            result[tensor.planned.name] = digest(typed)
    return result
