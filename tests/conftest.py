"""The models that most tests merge, made once a session."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.models import Family


def pytest_configure() -> None:
    """Let interrupts be what they are in a process of its own: pytest-xdist ignores them, and so do all children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and three sub-models that share some of its parameters, with tokenizers."""
    from tests.support.models import write_llamas

    return write_llamas(tmp_path_factory.mktemp("llamas"))
