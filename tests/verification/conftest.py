"""Outputs to verify: one file and several shards, each merged once and copied for a test that changes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import copied
from tests.support.models import small_family
from tests.support.recipes import merge


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output in one file, which no test may change."""
    return merge(small_family().recipe(), tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output in seven shards, which no test may change."""
    return merge(small_family().recipe(), tmp_path_factory.mktemp("sharded") / "out", out_shard_size=8_000)


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """An output in one file."""
    return copied(merged, tmp_path / "out")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    """An output in seven shards."""
    return copied(sharded, tmp_path / "out")
