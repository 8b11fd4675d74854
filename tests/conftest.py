"""Fixtures shared by the end-to-end tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from pathlib import Path
from typing import NamedTuple

import pytest


class Llamas(NamedTuple):
    """A base and three sub-models that share some of its parameters."""

    base: Path
    subs: list[Path]


@pytest.fixture(scope="session")
def llamas(tmp_path_factory) -> Llamas:
    from checkpoints import write_llama

    folder = tmp_path_factory.mktemp("llamas")
    base = write_llama(folder / "base", 0)
    return Llamas(base, [write_llama(folder / f"sub-{k}", k, near=base) for k in (1, 2, 3)])
