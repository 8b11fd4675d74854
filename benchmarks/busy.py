"""Another process that keeps one core busy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Ends by itself should its parent be killed.
_PROGRAM = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**6): pass
"""


@contextmanager
def one_core_busy(wanted: bool = True) -> Iterator[None]:
    """Keep one core busy for the length of the block, if wanted."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-S", "-c", _PROGRAM, str(os.getpid())])
    try:
        time.sleep(0.3)  # it takes the scheduler a moment to see that it is there to stay
        if process.poll() is not None:
            raise RuntimeError(f"the busy process ended by itself with status {process.returncode}")
        yield
    finally:
        process.kill()
        process.wait()
