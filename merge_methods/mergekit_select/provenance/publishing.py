"""Put a merge on a hub: by a pull request that is compared with the folder before it is merged."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from mergekit_select import kinds
from mergekit_select.errors import PlanError, UnreadableError
from mergekit_select.findings import Findings, some
from mergekit_select.inputs.digests import Digests, File, folder_files, root_digest
from mergekit_select.inputs.files import RECIPE, is_of_model, published_names
from mergekit_select.inputs.hub import read_revision, said
from mergekit_select.provenance.locking import file_differences
from mergekit_select.provenance.parents import Parent
from mergekit_select.provenance.recording import BESIDE, SIGNATURE

# Of another merge in the same repository: weights, which transformers might load instead, and a signature.
_STALE = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", SIGNATURE]
_FREE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "isc", "mpl-2.0", "unlicense"}
)


def refusals(folder: Path, parents: Sequence[Parent], allow_local: bool, signing: bool) -> Findings:
    """Say what speaks against publishing a merge of these models, as far as it is known."""
    found = Findings()
    if not signing and os.path.exists(folder / SIGNATURE):
        found.add(kinds.SIGNATURE_OLD, SIGNATURE)
    for parent in parents:
        if parent.commit is None and not allow_local:
            found.add(kinds.RECIPE_LOCAL, parent.reference)
        licence = (parent.licence or "").lower()
        if re.search(r"-nd\b", licence):
            found.add(kinds.LICENCE_FORBIDS, parent.reference, licence=licence)
        elif licence not in _FREE:
            found.add(kinds.LICENCE_UNKNOWN, parent.reference, licence=licence or "a model without a licence")
    for name in published_names(folder):
        if not (is_of_model(name) or name == RECIPE or name in BESIDE):
            found.add(kinds.PUBLISHED_BESIDE, name)
    return found


def common_licence(parents: Sequence[Parent]) -> str | None:
    """Return the licence that all models have; None where they differ."""
    licences = {parent.licence for parent in parents}
    return licences.pop() if len(licences) == 1 else None


def upload(
    folder: Path, repository: str, private: bool, digests: Digests, say: Callable[[str], object] = lambda _: None
) -> str:
    """Upload a folder, without those in it, to a repository of its own, and return the commit.

    The files go to a pull request, which is merged when the hub holds the same bytes. An upload that was cut off
    goes on in the same pull request.

    Args:
        folder: Finished, with record and card.
        repository: OWNER/NAME; made where it is not there.
        private: Whether it is to be private.
        digests: Remembers what was hashed.
        say: Told what happens.

    Raises:
        UnreadableError: The hub refuses something, or cannot be asked.
        PlanError: The repository is there and is public where it is to be private, or the reverse; or the hub holds
            other bytes than were sent.
    """
    files = folder_files(folder, digests, published_names(folder))
    # Without the signature, which is another one whenever it is made.
    held = {file.path: file.digest["sha256"] for file in files if file.path != SIGNATURE}
    title = f"mergekit-select publish {root_digest(held)[:16]}"
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if api.model_info(repository).private != private:
            raise PlanError(
                f"{repository} is {'public' if private else 'private'} on the hub; "
                f"{'give --public' if private else 'leave --public out'}, or change that in its settings there"
            )
        there = read_revision(repository, None)
        stale, kept = _others(there.files, files)
        if kept and len(held) < len(files):
            raise PlanError(
                f"{repository} must hold no files beside those that are signed, since a signature is over all files, "
                f"and holds {some(kept)}; remove them there, or publish without a signature"
            )
        if not stale and not _differences(repository, there.files, files):
            say(f"{repository} holds these files already")
            return there.commit
        number, status = _pull_request(api, repository, title)
        branch = f"refs/pr/{number}"
        say(f"uploading to pull request {number} of {repository}")
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch,
            commit_message=title,
            allow_patterns=[file.path for file in files],
            delete_patterns=_STALE,
        )
        wrong = _differences(repository, read_revision(repository, branch).files, files)
        if wrong:
            told = some([f"{found.message}, got {found.value or 'none'}" for found in wrong])
            raise PlanError(
                f"{repository}: the hub does not hold what was sent: {told}; pull request {number} stays open"
            )
        if status == "draft":
            api.change_discussion_status(repository, number, "open")
        api.merge_pull_request(repository, number)
        return read_revision(repository, None).commit
    except (PlanError, UnreadableError):
        raise
    except Exception as error:  # whatever huggingface_hub and the layers below raise
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        unknown = isinstance(cause, HfHubHTTPError) and cause.response.status_code == 401
        remedy = "log in with `hf auth login`" if unknown else "run the same command again: it goes on where it stopped"
        raise UnreadableError(f"publishing to {repository}: {said(cause)}; {remedy}") from error


def _pull_request(api: HfApi, repository: str, title: str) -> tuple[int, str]:
    """Return the pull request of an earlier attempt, or a new one."""
    for found in api.get_repo_discussions(repository):
        if found.is_pull_request and found.title == title and found.status in ("draft", "open"):
            return found.num, found.status
    made = api.create_pull_request(repository, title, description="Uploaded by mergekit-select publish.")
    return made.num, made.status


def _others(there: Sequence[File], files: Sequence[File]) -> tuple[list[str], list[str]]:
    """Return the files of a repository that are none of these: those that go, and those that stay."""
    ours = {file.path for file in files}
    others = [file.path for file in there if file.path not in ours]
    stale = [path for path in others if any(fnmatch.fnmatch(path, pattern) for pattern in _STALE)]
    return stale, [path for path in others if path not in stale]


def _differences(repository: str, there: Sequence[File], files: Sequence[File]) -> Findings:
    held = {file.path: file for file in there}
    return file_differences(repository, files, [held[file.path] for file in files if file.path in held])
