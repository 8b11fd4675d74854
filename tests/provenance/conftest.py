"""A hub for each test, and an environment that asks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api

from tests.provenance.hub_server import Hub, serving
from tests.support.models import small_family


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub, for commands that run in a process of their own."""
    with serving() as running:
        yield running


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub that this process asks, with a cache and no token of its own."""
    home = tmp_path / "hf-home"
    settings = {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # that of huggingface_hub's functions
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return hub


@pytest.fixture
def parents(online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with org/base, org/sub-0 and org/sub-1; the current folder is the test's."""
    monkeypatch.chdir(tmp_path)
    family = small_family()
    online.add("org/base", family.base)
    for number, sub in enumerate(family.subs[:2]):
        online.add(f"org/sub-{number}", sub)
    return online
