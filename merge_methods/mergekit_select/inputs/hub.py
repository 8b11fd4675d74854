"""A model on a hub, by metadata calls: config, tokenizer files and safetensors headers, never the weights."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from mergekit_select import kinds
from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.findings import UnusableModelError, some
from mergekit_select.inputs.checkpoint import Checkpoint, StoredTensor, stored_tensor
from mergekit_select.inputs.files import INDEXES, TOKENIZER_FILES, read_json

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 10  # seconds that the hub may take for one answer


def is_hub_id(path: str) -> bool:
    """Whether the text could name a repository on the hub."""
    if path.count("/") > 1:
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def is_pinned(revision: str | None) -> bool:
    """Whether the revision is a commit; branches and tags can move."""
    return revision is not None and bool(_COMMIT.fullmatch(revision))


def offline() -> bool:
    """Whether the environment keeps huggingface_hub from asking the hub."""
    return bool(constants.HF_HUB_OFFLINE)


def read_hub_model(repository: str, revision: str | None, folder: Path, cache: str | None = None) -> Checkpoint:
    """Ask the hub for a model's description.

    Args:
        repository: owner/name.
        revision: Branch, tag or commit.
        folder: An empty folder that receives config, tokenizer files and an index of tensor names.
        cache: Folder for the small files, as mergekit's --transformers-cache.

    Raises:
        UnusableModelError: It is no model that mergekit could merge, or the hub cannot be asked.
    """
    try:
        return _read(repository, revision, folder, cache)
    except UnusableModelError:
        raise
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UnusableModelError(kinds.HUB_REFUSES, problem=one_line(str(error).splitlines()[0])) from error
    except OfflineModeIsEnabled as error:
        raise UnusableModelError(kinds.HUB_OFFLINE) from error
    except UnreadableError as error:
        raise UnusableModelError(kinds.HUB_FILE_INVALID, problem=str(error)) from error
    except Exception as error:  # whatever the network layers raise; mergekit would meet the same
        problem = one_line(error)
        raise UnusableModelError(kinds.HUB_UNREACHABLE, endpoint=constants.ENDPOINT, problem=problem) from error


def _read(repository: str, revision: str | None, folder: Path, cache: str | None) -> Checkpoint:
    api = HfApi()
    info = api.model_info(repository, revision=revision, timeout=_TIMEOUT)
    commit = info.sha or revision
    files = [sibling.rfilename for sibling in info.siblings or ()]
    gguf = fnmatch.filter(files, "*.gguf")
    if "config.json" not in files:
        kind = kinds.HUB_GGUF_WITHOUT_CONFIG if gguf else kinds.HUB_WITHOUT_CONFIG
        raise UnusableModelError(kind, files=some(files))
    for file in {"config.json", *TOKENIZER_FILES} & set(files):
        shutil.copy(hf_hub_download(repository, file, revision=commit, cache_dir=cache), folder / file)
    tensors = None
    if fnmatch.filter(files, "*.safetensors"):
        try:
            metadata = api.get_safetensors_metadata(repository, revision=commit)
        except NotASafetensorsRepoError as error:
            raise UnusableModelError(kinds.HUB_OTHER_WEIGHTS, problem=one_line(str(error))) from error
        tensors = {
            name: stored_tensor(name, described.dtype, described.shape, "the header")
            for file in metadata.files_metadata.values()
            for name, described in file.tensors.items()
        }
        write_index(folder, tensors)
    elif not fnmatch.filter(files, "*.bin"):
        raise UnusableModelError(kinds.HUB_GGUF if gguf else kinds.HUB_WITHOUT_WEIGHTS, files=some(files))
    return Checkpoint(
        name=f"{repository}@{revision}" if revision else repository,
        folder=folder,
        config=read_json(folder / "config.json"),
        tensors=tensors,
        files=frozenset({(repository, info.sha)}),
        plain=False,
        pickle="" if tensors is None else None,
    )


def write_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Leave an index of names from which mergekit can plan; there are no shards behind it."""
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / INDEXES[0]).write_text(json.dumps({"weight_map": weight_map}))
