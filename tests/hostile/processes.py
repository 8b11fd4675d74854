"""Processes to stop and to limit: each forks from one that has imported mergekit, and says how it ended."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = 60  # after which a process is killed


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code, negative for a signal.
        said: What it wrote to stdout and stderr.
    """

    code: int
    said: str = ""


@dataclass(frozen=True)
class Running:
    """A process that was begun."""

    process: int
    output: int

    def end(self) -> Ended:
        """Wait for it, not for ever: a child of a process with threads may want a lock that nobody holds any more."""
        ends = time.monotonic() + SECONDS
        while True:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > ends:
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.002)
        with open(self.output, "rb") as file:
            said = file.read().decode(errors="replace")
        return Ended(os.waitstatus_to_exitcode(status), said)


def begun(run: Callable[[], object], kill_after: float | None = None) -> Running:
    """Run something in a process of its own; as a command, it may end with ``SystemExit``."""
    output, said = os.pipe()  # not a file, on which a limit on the size of files would tell
    fcntl.fcntl(said, fcntl.F_SETPIPE_SZ, 1 << 20)
    child = os.fork()
    if child == 0:
        _run(run, said, kill_after)
    os.close(said)
    return Running(child, output)


def _run(run: Callable[[], object], said: int, kill_after: float | None) -> None:
    """Run something, and end this process, whatever happens: nothing of its parent may be cleaned up here."""
    code = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115  # not pytest's
        if kill_after is not None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, as SIGKILL does
            signal.setitimer(signal.ITIMER_REAL, kill_after)
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def forked(run: Callable[[], object], kill_after: float | None = None) -> Ended:
    """Run something in a process of its own to its end."""
    return begun(run, kill_after).end()
