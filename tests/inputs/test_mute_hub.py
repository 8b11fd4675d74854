"""A hub that refuses or never answers is told in one line, by every command, after ten seconds at most."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.support.commands import run
from tests.support.models import small_family
from tests.support.recipes import merge, written

LINE = "asking http://127.0.0.1:"


@pytest.mark.parametrize("command", ["check", "inspect", "verify"])
@pytest.mark.parametrize("mute", [True, False], ids=["mute", "refused"])
def test_one_line(mute: bool, command: str, tmp_path: Path) -> None:
    out = merge(small_family().recipe(), tmp_path / "out")
    recipe = written(tmp_path / "recipe.yml", {**small_family().recipe(), "base_model": "owner/name"})
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not mute:
            server.close()
        env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
        began = time.monotonic()
        arguments = [out, "--recipe", recipe] if command == "verify" else [recipe]
        done = run("mergekit-select", command, *arguments, env=env)
        took = time.monotonic() - began
    assert done.returncode == (1 if command == "check" else 2)
    output = done.stdout + done.stderr
    assert "owner/name" in output
    assert LINE in output
    assert len(done.stderr.splitlines()) <= 1
    assert took < 45  # 10 s, and mergekit's imports on a busy machine
