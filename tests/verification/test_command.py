"""``mergekit-select verify``: its text, its JSON, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.checkpoints import save, tensors_of
from tests.support.commands import invoke, run, to_full_disk
from tests.verification.support import TENSORS


def test_text(merged: Path) -> None:
    result = invoke("verify", merged)
    assert result.exit_code == 0
    assert result.output == (
        f"SAME: every bit of {merged} is what its recipe gives; "
        "21 tensors with 19,616 parameters compared (parameter_selection_resampling)\n"
    )


def test_json(out: Path) -> None:
    tensors = tensors_of(out)
    tensors["model.norm.weight"] += 1
    save(out, tensors)
    result = invoke("verify", out, "--json")
    content = json.loads(result.output)
    assert (content["schema"], content["command"], content["ok"]) == (1, "verify", False)
    assert content["tensors"] == TENSORS
    assert content["determinism"] == "exact"
    assert content["differences"][0]["index"] == [0]
    assert result.exit_code == 1


def test_many_differences_are_cut_off(out: Path) -> None:
    save(out, {name: value + 1 for name, value in tensors_of(out).items()})
    lines = invoke("verify", out).output.splitlines()
    assert len(lines) == 22
    assert lines[-2] == "and 1 more; --json lists all"


def test_real_process_and_full_disk(merged: Path) -> None:
    done = run("mergekit-select", "verify", merged)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("SAME: ")
    if not Path("/dev/full").exists():
        return
    done = to_full_disk("verify", merged, "--json")
    assert done.returncode == 2
    assert done.stderr == "Error: cannot write the report to stdout: No space left on device\n"
