"""docs/sharing.md, command by command: one user publishes, another makes it again by its name."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.provenance.hub_server import Hub, environment
from tests.support.models import small_family

PAGE = Path(__file__).parents[2] / "docs" / "sharing.md"


@pytest.mark.slow
def test_the_walk_from_recipe_to_a_strangers_reproduction(hub: Hub, tmp_path: Path) -> None:
    text = PAGE.read_text("utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    if importlib.util.find_spec("model_signing") is None or shutil.which("openssl") is None:
        commands = [command for command in commands if "key" not in command]
    family = small_family()
    for name, model in zip(("base", "order-1", "order-2"), (family.base, *family.subs), strict=False):
        hub.add(f"example/{name}", model)
    users = {"maker": environment(hub, tmp_path / "maker-home"), "stranger": environment(hub, tmp_path / "home", None)}
    for user in users:
        (tmp_path / user).mkdir()
    (tmp_path / "maker" / "recipe.yml").write_text(recipe)
    said = {}
    for command in commands:
        user = "stranger" if re.search(r" (reproduce|verify you/merged)", command) else "maker"
        program = command.split()
        if program[0] == "mergekit-select":
            program[:1] = [sys.executable, "-W", "ignore", "-m", "mergekit_select.cli"]
        done = subprocess.run(
            program, cwd=tmp_path / user, env={**os.environ, **users[user]}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        said[command.removeprefix("mergekit-select ")] = (done.stdout.strip().splitlines() or [""])[-1]
        if "-out key.pub" in command:
            shutil.copy(tmp_path / "maker" / "key.pub", tmp_path / "stranger")
    commit = hub.repositories["you/merged"].refs["main"]
    assert said["lock recipe.yml"] == "LOCKED: recipe.lock.json"
    assert said["verify out --record"].startswith("SAME: ")
    published = [line for command, line in said.items() if command.startswith("publish") and "--dry-run" not in command]
    assert published[-1] == f"you/merged@{commit}"
    assert said["reproduce you/merged --dry-run"] == "POSSIBLE: you/merged"
    assert said["reproduce you/merged"].startswith("SAME: all ")
    assert {path.name for path in (tmp_path / "stranger").iterdir()} <= {"key.pub"}
