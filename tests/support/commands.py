"""Console scripts, in processes of their own and in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner, Result


def run(
    command: str, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a console script of the environment that the tests run in."""
    program = Path(sys.executable).with_name(command)
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
    )


def script(command: str) -> click.Command:
    """What a console script calls."""
    (entry,) = entry_points(group="console_scripts", name=command)
    loaded: Any = entry.load()
    assert isinstance(loaded, click.Command)
    return loaded


def run_here(command: str, *arguments: object) -> None:
    """Call what a console script calls, in this process, and let its exceptions through; seconds faster than `run`."""
    from mergekit.io.tasks import LoaderCache

    LoaderCache.loaders.clear()
    script(command).main(args=[str(argument) for argument in arguments], prog_name=command, standalone_mode=False)


def invoke(*arguments: object) -> Result:
    """Run mergekit-select in this process: exit code, stdout and stderr; no exception may leave it."""
    result = CliRunner().invoke(
        script("mergekit-select"), [str(argument) for argument in arguments], prog_name="mergekit-select"
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def one_line(result: Result, code: int, text: str) -> None:
    """Assert that a command said one line that holds the text, and ended with the code."""
    assert result.exit_code == code, result.output
    assert text in result.output
    assert len(result.output.strip().splitlines()) == 1, result.output


def to_full_disk(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run mergekit-select in a process of its own whose stdout is full."""
    program = Path(sys.executable).with_name("mergekit-select")
    with open("/dev/full", "w") as full:
        return subprocess.run(
            [str(program), *map(str, arguments)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
