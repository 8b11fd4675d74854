"""Kill merges at many points, and go on with them. Run as `python killed.py RECIPE OUT POINTS SHARD_SIZE`.

Each merge is a process, forked from this one so that torch is loaded once, and kills itself with SIGKILL just before
the n-th of its calls that change anything on the disk. Prints, as JSON, how many such calls a whole merge makes, and
for each point the names in OUT after the kill and whether the same merge went on to its end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mergekit_select.execution.finish  # before forking, for what it imports
import mergekit_select.execution.work  # noqa: F401
from mergekit_select.execution.local import merge
from mergekit_select.execution.request import Request

torch.set_num_threads(1)  # a forked process has none of its parent's threads


def count_calls(act: Callable[[int], None]) -> None:
    """Have every call that changes the disk, or waits for it, announced with its number."""
    calls = 0

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            act(calls)
            return function(*args, **keywords)

        return call

    for owner, name in [
        (os, "fsync"),
        (os, "pwrite"),
        (os, "mkdir"),
        (os, "rename"),
        (os, "replace"),
        (os, "unlink"),
        (Path, "write_text"),
        (shutil, "rmtree"),
        (shutil, "copyfile"),
    ]:
        setattr(owner, name, wrapped(getattr(owner, name)))


def in_a_process(request: Request, act: Callable[[int], None]) -> int:
    """Merge in a process of its own; return its exit code."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            count_calls(act)
            code = 0 if merge(request, jobs=1).finished else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(number: int) -> Callable[[int], None]:
    return lambda call: os.kill(os.getpid(), signal.SIGKILL) if call == number else None


def main(recipe: str, out: str, points: int, size: int) -> None:
    request = Request(recipe, out, {"out_shard_size": size})
    note = Path(f"{out}.calls")

    def write_down(call: int) -> None:
        descriptor = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(descriptor, str(call).encode())
        os.close(descriptor)

    assert in_a_process(request, write_down) == 0
    total = int(note.read_text())
    killed = []
    for point in range(points):
        shutil.rmtree(out)
        number = 1 + point * (total - 1) // (points - 1)
        code = in_a_process(request, kill_at(number))
        names = sorted(os.listdir(out)) if os.path.exists(out) else []
        resumed = in_a_process(request, lambda call: None)
        shutil.copytree(out, f"{out}-{point}")
        killed.append({"call": number, "code": code, "names": names, "resumed": resumed})
    # The same folder, killed again and again: every process gets a little further, or as far as the one before.
    shutil.rmtree(out)
    kills = 0
    while (code := in_a_process(request, kill_at(total // points + kills))) == -signal.SIGKILL:
        kills += 1
    print(json.dumps({"calls": total, "killed": killed, "kills": kills, "end": code}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
