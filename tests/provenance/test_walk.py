"""docs/sharing.md, command by command: one user publishes, another makes it again by its name."""

from __future__ import annotations

import os
import re
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
    commands = re.findall(r"```sh\nmergekit-select (.*)\n```", text)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert [command.split()[0] for command in commands] == [
        *("lock", "run", "verify", "publish", "publish"),
        *("reproduce", "reproduce"),
    ]
    family = small_family()
    for name, model in zip(("base", "order-1", "order-2"), (family.base, *family.subs), strict=False):
        hub.add(f"example/{name}", model)
    users = {"maker": environment(hub, tmp_path / "maker-home"), "stranger": environment(hub, tmp_path / "home", None)}
    said = []
    for command in commands:
        user = "stranger" if command.startswith("reproduce") else "maker"
        folder = tmp_path / user
        folder.mkdir(exist_ok=True)
        if user == "maker":
            (folder / "recipe.yml").write_text(recipe)
        program = [sys.executable, "-W", "ignore", "-m", "mergekit_select.cli", *command.split()]
        done = subprocess.run(
            program, cwd=folder, env={**os.environ, **users[user]}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        said.append(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "")
    commit = hub.repositories["you/merged"].refs["main"]
    assert said[0] == "LOCKED: recipe.lock.json"
    assert said[2].startswith("SAME: ")
    assert said[4] == f"you/merged@{commit}"
    assert said[5] == "POSSIBLE: you/merged"
    assert said[6].startswith("SAME: all ")
    assert not [*(tmp_path / "stranger").iterdir()]
