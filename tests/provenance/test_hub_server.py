"""The hub of these tests behaves as huggingface_hub expects of one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from tests.provenance.hub_server import TOKEN, Hub, blob_id

FILES = {"config.json": b"{}", "a.json": b"1", "b.json": b"2", "model.safetensors": b"weights"}


def test_tree_in_pages_with_digests(online: Hub) -> None:
    commit = online.add("org/model", FILES)
    api = HfApi()
    assert api.model_info("org/model").sha == commit
    listed = api.list_repo_tree("org/model", recursive=True, revision=commit)
    tree = {file.path: file for file in listed if isinstance(file, RepoFile)}
    assert tree.keys() == {*FILES, "README.md"}
    large = tree["model.safetensors"].lfs
    assert large is not None
    assert large.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert tree["config.json"].blob_id == blob_id(b"{}")
    (one,) = api.get_paths_info("org/model", ["a.json"], revision="main")
    assert isinstance(one, RepoFile)
    assert one.size == 1


def test_download_follows_the_redirect_of_a_large_file(online: Hub, tmp_path: Path) -> None:
    commit = online.add("org/model", FILES)
    folder = huggingface_hub.snapshot_download("org/model", cache_dir=tmp_path)
    assert folder.endswith(commit)
    assert (tmp_path / folder / "model.safetensors").read_bytes() == b"weights"
    assert any("/cdn/" in request for request in online.requests)


def test_upload_to_a_pull_request_and_merge(online: Hub, tmp_path: Path) -> None:
    api = HfApi(token=TOKEN)
    api.create_repo("me/new", private=True)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    pull = api.create_pull_request("me/new", "a title")
    api.upload_folder(repo_id="me/new", folder_path=tmp_path, revision=f"refs/pr/{pull.num}")
    assert "config.json" not in online.files("me/new")
    (found,) = api.get_repo_discussions("me/new")
    assert (found.title, found.status) == ("a title", "draft")
    api.change_discussion_status("me/new", pull.num, "open")
    api.merge_pull_request("me/new", pull.num)
    assert {name: online.files("me/new")[name] for name in FILES} == FILES
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("me/new")


def test_refusals(online: Hub) -> None:
    online.add("org/gated", FILES, gated=True)
    with pytest.raises(GatedRepoError):
        HfApi(token=False).auth_check("org/gated")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("org/nothing")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("org/gated", revision="nowhere")
    online.fail("GET /api/models/org/gated", 500, times=1)
    with pytest.raises(HfHubHTTPError):
        HfApi().model_info("org/gated")
    assert HfApi().model_info("org/gated").sha
