"""A model on a hub, by metadata calls: config, tokenizer files and safetensors headers, never the weights."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._validators import validate_repo_id

from mergekit_select import kinds
from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.findings import UnusableModelError, some
from mergekit_select.inputs.checkpoint import Checkpoint, StoredTensor, stored_tensor
from mergekit_select.inputs.digests import Digests, File, by_path, folder_files
from mergekit_select.inputs.files import INDEXES, RECIPE, TOKENIZER_FILES, hidden, is_of_model, read_json

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
        folder: An empty folder that receives config, tokenizer files, a merge's recipe, and an index of tensor names.
        cache: Folder for the small files, as mergekit's --transformers-cache.

    Raises:
        UnusableModelError: It is no model that mergekit could merge, or the hub cannot be asked.
    """
    with hub_errors():
        return _read(repository, revision, folder, cache)


def require_repository(repository: str, revision: str | None) -> None:
    """Ask the hub for a model, once and not for long: mergekit and transformers would ask on for minutes.

    Raises:
        UnreadableError: The hub cannot be asked, or does not give it.
    """
    try:
        with hub_errors():
            HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT)
    except UnusableModelError as error:
        raise UnreadableError(f"model {repository}: {error}") from error


@contextmanager
def hub_errors() -> Iterator[None]:
    """Let what huggingface_hub raises be one of this package's errors, of a kind that says what to do.

    Raises:
        UnusableModelError: Instead of it.
    """
    try:
        yield
    except UnusableModelError:
        raise
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        kind = kinds.HUB_REVISION_GONE if isinstance(error, RevisionNotFoundError) else kinds.HUB_REFUSES
        kind = kinds.HUB_GATED if isinstance(error, GatedRepoError) else kind
        raise UnusableModelError(kind, problem=said(error)) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if not offline():  # a download that failed and is not in the cache
            problem = said(error.__cause__ or error)
            raise UnusableModelError(kinds.HUB_UNREACHABLE, endpoint=constants.ENDPOINT, problem=problem) from error
        raise UnusableModelError(kinds.HUB_OFFLINE) from error
    except UnreadableError as error:
        raise UnusableModelError(kinds.HUB_FILE_INVALID, problem=str(error)) from error
    except Exception as error:  # whatever the network layers raise; mergekit would meet the same
        raise UnusableModelError(kinds.HUB_UNREACHABLE, endpoint=constants.ENDPOINT, problem=said(error)) from error


def said(error: BaseException) -> str:
    """Return an error's first line, without the token that it was met with."""
    text = one_line(error if not isinstance(error, HfHubHTTPError) else str(error).splitlines()[0])
    token = get_token()
    return text.replace(token, "(token)") if token else text


@dataclass(frozen=True)
class HubRevision:
    """A repository at one commit, from metadata alone; offline, from the cache.

    Attributes:
        commit: The commit that the revision names now.
        licence: As its card's metadata gives it.
        files: What the commit holds; offline, what of it was downloaded.
    """

    commit: str
    licence: str | None
    files: tuple[File, ...]

    @property
    def model(self) -> tuple[File, ...]:
        """Those files that belong to a model by their names."""
        return tuple(file for file in self.files if is_of_model(file.path))


def read_revision(
    repository: str, revision: str | None, cache: str | None = None, digests: Digests | None = None
) -> HubRevision:
    """Ask the hub which commit a revision is, and for the digests of its files.

    Args:
        repository: owner/name.
        revision: Branch, tag or commit; None for the hub's default.
        cache: As mergekit's --transformers-cache, for what is in it offline.
        digests: Remembers those of files that have to be hashed.

    Raises:
        UnusableModelError: The hub refuses it, or cannot be asked.
    """
    with hub_errors():
        if offline():
            folder = _cached(repository, revision, cache)
            return HubRevision(folder.name, licence_of(folder), folder_files(folder, digests or Digests()))
        api = HfApi()
        info = api.model_info(repository, revision=revision, timeout=_TIMEOUT)
        commit = str(info.sha)
        entries = api.list_repo_tree(repository, recursive=True, revision=commit)
        files = [
            File(
                entry.path,
                entry.lfs.size if entry.lfs else entry.size,
                {"sha256": entry.lfs.sha256} if entry.lfs else {"gitBlob": entry.blob_id},
            )
            for entry in entries
            if isinstance(entry, RepoFile) and not hidden(entry.path)
        ]
        licence = getattr(info.card_data, "license", None)
    return HubRevision(commit, licence if isinstance(licence, str) else None, tuple(sorted(files, key=by_path)))


def _cached(repository: str, revision: str | None, cache: str | None) -> Path:
    """Return where a model lies in the cache, as far as a merge has downloaded it: without its card, for one."""
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        found = try_to_load_from_cache(repository, name, cache or constants.HF_HUB_CACHE, revision)
        if isinstance(found, str):
            return Path(found).parent
    return Path(snapshot_download(repository, revision=revision, cache_dir=cache, local_files_only=True))


def licence_of(folder: Path) -> str | None:
    """Return the licence that the card of a model's folder gives; None where it gives none that can be read."""
    try:
        licence = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except Exception:  # whatever huggingface_hub makes of what people write there
        return None
    return licence if isinstance(licence, str) else None


def _read(repository: str, revision: str | None, folder: Path, cache: str | None) -> Checkpoint:
    api = HfApi()
    info = api.model_info(repository, revision=revision, timeout=_TIMEOUT)
    commit = info.sha or revision
    files = [sibling.rfilename for sibling in info.siblings or ()]
    gguf = fnmatch.filter(files, "*.gguf")
    if "config.json" not in files:
        kind = kinds.HUB_GGUF_WITHOUT_CONFIG if gguf else kinds.HUB_WITHOUT_CONFIG
        raise UnusableModelError(kind, files=some(files))
    for file in {"config.json", RECIPE, *TOKENIZER_FILES} & set(files):
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
