"""A command whose answer was not given ends with neither yes nor no."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mergekit_select.errors import PlanError
from tests.support.commands import invoke, one_line, run
from tests.support.models import small_family
from tests.support.recipes import recipe, written

COMMAND = str(Path(sys.executable).with_name("mergekit-select"))
QUESTIONS = ("check", "inspect", "verify")


@pytest.fixture
def mute_hub() -> Iterator[str]:
    """An endpoint that accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted; there is no answer"),
        (SystemExit(0), 70, "ended the process with sys.exit(0), and there is no answer"),
        (SystemExit("\x1b"), 70, "there is no answer"),
        (PermissionError(13, "Permission denied", "models/\x1b"), 2, "Error: Permission denied: models/\\x1b"),
        (OSError("of a package"), 70, "OSError: of a package. This is a bug"),
        (MemoryError(), 70, "not enough memory"),
        (RecursionError("deep"), 70, "RecursionError: deep. This is a bug"),
        (TypeError("\x1b"), 70, "TypeError: \\x1b. This is a bug"),
    ],
    ids=repr,
)
def test_whatever_happens_it_is_one_line(
    error: BaseException, code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("mergekit_select.check.check", fail)
    one_line(invoke("check", written(tmp_path / "recipe.yml", small_family().recipe())), code, text)


def test_the_report_id_is_the_same_for_the_same_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: object, *_arguments: object, **_options: object) -> None:
        raise TypeError(name)

    monkeypatch.setattr("mergekit_select.check.check", fail)
    outputs = [invoke("check", name).output for name in ("a", "b")]
    ids = [re.findall("report id ([0-9a-f]{8}):", output) for output in outputs]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 1
    monkeypatch.setenv("MERGEKIT_SELECT_DEBUG", "1")
    assert "Traceback" in invoke("check", "a").output


@pytest.mark.parametrize(
    "error", [ImportError("what a package makes of it"), PlanError("what we make of that"), OSError()]
)
def test_an_interrupt_that_a_package_swallows(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does while it looks for optional packages."""

    def swallow(*_: object, **__: object) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise error

    monkeypatch.setattr("mergekit_select.check.check", swallow)
    said = invoke("check", "a")
    assert said.exit_code == 130
    assert said.stderr.splitlines()[-1] == "Error: interrupted; there is no answer"
    assert "bug" not in said.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals(number: int, code: int, mute_hub: str, tmp_path: Path) -> None:
    """A shell shows the second as 143."""
    file = written(tmp_path / "recipe.yml", recipe("linear", None, ["owner/name", "owner/other"]))
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": mute_hub}
    process = subprocess.Popen([COMMAND, "check", str(file)], env=env, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)  # anywhere: while torch is imported, or while the hub is asked
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--json"]], ids=str)
def test_closed_pipe(arguments: list[str], tmp_path: Path) -> None:
    if arguments[0] == "check":
        arguments = [*arguments, str(written(tmp_path / "recipe.yml", small_family().recipe()))]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([COMMAND, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_plugin_that_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "quitter.py").write_text("import sys\nsys.exit(0)\n")
    metadata = tmp_path / "quitter-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: quitter\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mergekit.merge_methods]\nquit = quitter:quit\n")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    file = written(tmp_path / "r.yml", small_family().recipe("unknown"))
    (tmp_path / "config.json").write_text("{}")
    for question in QUESTIONS:
        done = run(
            "mergekit-select", question, *((tmp_path, "--recipe") if question == "verify" else ()), file, env=env
        )
        assert done.returncode in (1, 2), done.stderr
        assert "skipped entry point 'quit = quitter:quit' of quitter 1.0" in done.stderr
        assert "SystemExit: 0" in done.stderr
    done = run("mergekit-yaml", written(file, small_family().recipe()), tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
