"""The end of a merge: everything beside the tensors is written, and all goes to its place, config.json last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.execution.job import Job
from mergekit_select.execution.workspace import FINISHING
from mergekit_select.inputs.checkpoint import StoredTensor
from mergekit_select.inputs.files import sync
from mergekit_select.planner.companions import finish_folder

_LAST = "config.json"  # without it no folder is a model


def finish(job: Job) -> dict[str, tuple[StoredTensor, str]]:
    """Make a folder whose parts are all recorded what stock mergekit would have written.

    One process does it; another one waits, and finds it done.

    Returns:
        Each tensor's description and digest.

    Raises:
        UnreadableError: A part is missing, or something cannot be written.
        PlanError: mergekit refuses to write what stands beside the tensors.
    """
    workspace = job.workspace
    with workspace.locked(FINISHING, wait=True):
        if workspace.finished:
            return _identities(job, workspace.kept_digests())
        digests = {}
        for part in job.layout.parts:
            digests.update(workspace.digests(part.number))
        try:
            _stage(job)
            for file in job.layout.files:
                _move_file(job, file.name, file.size)
            sync(workspace.out)
            _move_staged(workspace.staging, workspace.out)
            workspace.close_work(digests)
        except OSError as error:
            raise UnreadableError(
                f"cannot finish {workspace.out}: {one_line(error)}; "
                f"once that is mended, the same command goes on from here"
            ) from error
        return _identities(job, digests)


def _identities(job: Job, digests: Mapping[str, str]) -> dict[str, tuple[StoredTensor, str]]:
    tensors = (tensor for file in job.layout.files for tensor in file.tensors)
    return {tensor.planned.name: (tensor.stored, digests[tensor.planned.name]) for tensor in tensors}


def _stage(job: Job) -> None:
    """Write what stands beside the tensors to a folder of its own, so that nothing half written is ever in place."""
    folder = job.workspace.staging
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    recipe = job.recipe if job.request.verbatim else job.engine.plan.rewritten.to_yaml()
    # As mergekit names the model in its card.
    finish_folder(job.engine, folder, os.path.basename(job.request.out), recipe)
    if job.layout.index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(job.layout.index, indent=2), encoding="utf-8")


def _move_file(job: Job, name: str, size: int) -> None:
    path = job.workspace.place(name)
    found = path.stat().st_size if path.exists() else None
    if found != size:
        raise UnreadableError(
            f"{path} must have {size} bytes, and {'is not there' if found is None else f'has {found}'}; "
            f"repeat the merge with --rehash"
        )
    path.replace(job.workspace.out / name)


def _move_staged(staging: Path, out: Path) -> None:
    staged = sorted(staging.iterdir(), key=lambda path: (path.name == _LAST, path.name))
    for path in staged:
        if path.is_file():
            sync(path)
    for path in staged:
        if path.name == _LAST:
            sync(out)
        target = out / path.name
        if path.is_dir():  # a tokenizer's additional chat templates
            shutil.rmtree(target, ignore_errors=True)
        path.replace(target)
    sync(out)
