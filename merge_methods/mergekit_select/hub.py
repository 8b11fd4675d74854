"""A hub model's description by metadata calls: config, tokenizer files and safetensors headers, never the weights."""

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

from mergekit_select.checkpoints import TOKENIZER_FILES, Checkpoint, read_json
from mergekit_select.findings import Findings, one_line, some
from mergekit_select.safetensors_header import DTYPES, CheckpointError, Tensor

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 10


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


def open_hub(
    repository: str,
    revision: str | None,
    folder: Path,
    place: str,
    findings: Findings,
    cache: str | None = None,
) -> Checkpoint | None:
    """Ask the hub for a model's description, or add why it cannot be merged.

    Args:
        repository: owner/name.
        revision: Branch, tag or commit.
        folder: An empty folder that receives config, tokenizer files and an index of tensor names.
        place: Recipe key that names the model.
        findings: Where to add what is wrong.
        cache: Folder for the small files, as mergekit's --transformers-cache.
    """
    name = f"{repository}@{revision}" if revision else repository
    try:
        return _open(repository, revision, name, folder, place, findings, cache)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        findings.error(
            "model-missing",
            place,
            name,
            f"there is no such folder here, and the hub answers: {one_line(str(error).splitlines()[0])}",
            "correct the path or id, or log in with `hf auth login` for a gated or private model",
        )
    except OfflineModeIsEnabled:
        findings.error(
            "hub-unreachable",
            place,
            name,
            "there is no such folder here, and HF_HUB_OFFLINE keeps mergekit and check from asking the hub",
            "unset HF_HUB_OFFLINE, or give a local folder that begins with ./ or /",
        )
    except CheckpointError as error:
        findings.error("model-unreadable", place, name, str(error), "report it to the model's author")
    except Exception as error:  # whatever the network layers raise; mergekit would meet the same
        findings.error(
            "hub-unreachable",
            place,
            name,
            f"there is no such folder here, and asking {constants.ENDPOINT} failed: {one_line(error)}",
            "check the network, or give a local folder that begins with ./ or /",
        )
    return None


def _open(
    repository: str,
    revision: str | None,
    name: str,
    folder: Path,
    place: str,
    findings: Findings,
    cache: str | None,
) -> Checkpoint | None:
    api = HfApi()
    info = api.model_info(repository, revision=revision, timeout=_TIMEOUT)
    files = [sibling.rfilename for sibling in info.siblings or ()]
    if "config.json" not in files:
        findings.error(
            "model-quantised" if fnmatch.filter(files, "*.gguf") else "model-missing",
            place,
            name,
            f"a model must have a config.json, and the repository has only {some(files)}",
            "give a repository in Hugging Face format",
        )
        return None
    for file in {"config.json", *TOKENIZER_FILES} & set(files):
        shutil.copy(hf_hub_download(repository, file, revision=info.sha or revision, cache_dir=cache), folder / file)
    tensors = None
    if fnmatch.filter(files, "*.safetensors"):
        try:
            metadata = api.get_safetensors_metadata(repository, revision=info.sha or revision)
        except NotASafetensorsRepoError as error:
            message = f"mergekit needs model.safetensors or its index, and the repository has neither: {error}"
            findings.error("model-missing", place, name, one_line(message), "give another repository")
            return None
        tensors = {
            tensor: _tensor(tensor, description.dtype, description.shape, description.data_offsets)
            for file in metadata.files_metadata.values()
            for tensor, description in file.tensors.items()
        }
        write_index(folder, tensors)
    elif fnmatch.filter(files, "*.bin"):
        findings.warning(
            "model-pickled",
            place,
            name,
            "the weights are pickles, whose tensors cannot be known without downloading them",
            "choose a revision with safetensors",
        )
    else:
        findings.error(
            "model-quantised" if fnmatch.filter(files, "*.gguf") else "model-missing",
            place,
            name,
            f"mergekit reads safetensors and PyTorch pickles, and the repository has only {some(files)}",
            "give a repository with safetensors",
        )
        return None
    return Checkpoint(
        name, folder, read_json(folder / "config.json"), tensors, frozenset({(repository, info.sha)}), plain=False
    )


def _tensor(name: str, dtype: str, shape: list[int], offsets: tuple[int, int]) -> Tensor:
    if dtype not in DTYPES:
        raise CheckpointError(f"the header gives {name} the unknown dtype {dtype!r}")
    return Tensor(DTYPES[dtype][0], tuple(shape), offsets[1] - offsets[0])


def write_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Leave an index of names from which mergekit can plan; there are no shards behind it."""
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
