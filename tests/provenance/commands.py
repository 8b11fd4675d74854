"""Run mergekit-select: in this process, or as the user of a hub in a process of their own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner
from hub_server import TOKEN, Hub


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The environment of a user whose hub this is, for a process of their own."""
    return {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
    }


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> Ran:
    """Run mergekit-select in this process."""
    from mergekit_select.cli import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)
