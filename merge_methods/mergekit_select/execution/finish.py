"""The end of a merge: everything beside the tensors is written, and all goes to its place, config.json last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.execution.job import Job, require_no_other
from mergekit_select.execution.work import stored_digests
from mergekit_select.execution.workspace import FINISHING
from mergekit_select.findings import some
from mergekit_select.inputs.checkpoint import StoredTensor
from mergekit_select.inputs.digests import Digests
from mergekit_select.inputs.files import WORKSPACE, model_names, names_in, state, sync
from mergekit_select.planner.companions import finish_folder

_LAST = "config.json"  # without it no folder is a model
_CARD = "README.md"  # which people may edit


def finish(job: Job, rehash: bool = False) -> dict[str, tuple[StoredTensor, str]]:
    """Make a folder whose parts are all recorded what stock mergekit would have written.

    One process does it; another one waits, and finds it done.

    Args:
        job: The merge.
        rehash: Whether to read all tensors again where it was done before.

    Returns:
        Each tensor's description and digest.

    Raises:
        UnreadableError: A part is missing, something cannot be written, an input has changed, or the folder is not what
            the merge left there, or holds more.
        PlanError: mergekit refuses to write what stands beside the tensors.
    """
    workspace = job.workspace
    with workspace.locked(FINISHING, wait=True):
        if workspace.finished:
            digests = workspace.kept_digests()
            _require_kept(job, digests, rehash)
            return _identities(job, digests)
        job.check_inputs()
        require_no_other(workspace)
        digests = {}
        for part in job.layout.parts:
            digests.update(workspace.digests(part.number))
        try:
            _stage(job)
            beside = names_in(workspace.staging)
            workspace.begin_moving(beside)
            _require_own(job, beside)
            for file in job.layout.files:
                _move_file(job, file.name, file.size)
            sync(workspace.out)
            _move_staged(workspace.staging, workspace.out)
            workspace.close_work(digests, _described(job, beside))
        except OSError as error:
            raise UnreadableError(
                f"cannot finish {workspace.out}: {one_line(error)}; "
                f"once that is mended, the same command goes on from here"
            ) from error
        return _identities(job, digests)


def _identities(job: Job, digests: Mapping[str, str]) -> dict[str, tuple[StoredTensor, str]]:
    tensors = (tensor for file in job.layout.files for tensor in file.tensors)
    return {tensor.planned.name: (tensor.stored, digests[tensor.planned.name]) for tensor in tensors}


def _described(job: Job, beside: Iterable[str]) -> dict[str, dict[str, object]]:
    """Describe the files of the finished output: those with tensors by their states, the others by digest."""
    out, digests = job.workspace.out, Digests()
    return {
        "weights": {file.name: state(out / file.name) for file in job.layout.files},
        "beside": {name: digests.of(out / name)["sha256"] for name in beside if name != _CARD},
    }


def _require_own(job: Job, beside: Iterable[str]) -> None:
    """Refuse an output with files that transformers or peft may load and that no part of this merge has written."""
    out = job.workspace.out
    others = {*model_names(out)} - {*beside} - {file.name for file in job.layout.files}
    if others:
        raise UnreadableError(
            f"{out} must hold no other model's files, and holds {some(sorted(others))}; "
            f"remove them, and repeat the command"
        )


def _require_kept(job: Job, digests: Mapping[str, str], rehash: bool) -> None:
    """Refuse a finished output that is not what the merge left there; tensors are read where a file may be another."""
    out, kept = job.workspace.out, job.workspace.kept_files()
    states, beside = kept.get("weights", {}), kept.get("beside", {})
    wrong = [name for name, sha256 in beside.items() if not _is(out / name, sha256)]
    for file in job.layout.files:
        path = out / file.name
        parts = [part for part in job.layout.parts if part.file is file]
        if not path.is_file() or path.stat().st_size != file.size:
            wrong.append(file.name)
        elif rehash or state(path) != states.get(file.name):
            found = {name: digest for part in parts for name, digest in stored_digests(path, part).items()}
            if found != {tensor.planned.name: digests[tensor.planned.name] for tensor in file.tensors}:
                wrong.append(file.name)
    if wrong:
        raise UnreadableError(
            f"{out} was finished, and {some(sorted(wrong))} must be as the merge left it, and is not; "
            f"remove the folder, its {WORKSPACE} included, and merge again"
        )
    if kept:
        _require_own(job, beside)


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and Digests().of(path)["sha256"] == sha256


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
