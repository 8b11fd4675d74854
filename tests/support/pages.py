"""What the documentation shows, and a reader who types it."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

from tests.support.commands import invoke, run_here

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str, section: str | None = None) -> list[str]:
    """The fenced blocks of one language, of a page or of one of its sections."""
    text = (ROOT / page).read_text("utf-8")
    if section is not None:
        (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return [body for found, body in _FENCED.findall(text) if found == language]


def commands(page: str) -> Iterator[str]:
    """The commands of a page's shell blocks, and those after a prompt in other blocks, without comments."""
    for language, body in _FENCED.findall((ROOT / page).read_text("utf-8")):
        lines = body.replace("\\\n", " ").splitlines()
        if language not in ("sh", "bash"):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in lines:
            command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            if command:
                yield command


def shown(page: str, command: str) -> list[str]:
    """The lines that a page shows below a command with a prompt."""
    for _, body in _FENCED.findall((ROOT / page).read_text("utf-8")):
        before, found, after = body.partition(f"$ {command}\n")
        if found and (not before or before.endswith("\n")):
            return re.split(r"^\$ ", after, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    raise AssertionError(f"{page} does not show what {command} says")


def typed(command: str, code: int = 0) -> str:
    """Run one command of mergekit or of this package in the current folder, and return what it printed."""
    program, *arguments = shlex.split(command)
    if program == "mergekit-select":
        result = invoke(*arguments)
        assert result.exit_code == code, (command, result.output)
        return result.stdout
    with redirect_stderr(io.StringIO()):  # progress bars
        run_here(program, *arguments)
    return ""
