"""Peak memory of one merge beyond its inputs and its output, measured in a process of its own.

`measure` runs `python benchmarks/memory.py CONTESTANT CASE-AS-JSON`, which prints a number of bytes. Linux only.

The process makes the inputs, merges their first elements once (so that code pages and one-time tables are there), hands
free heap pages back to the system, and allocates and writes an output. Its resident set is then the baseline. The
output is released, the kernel's high-water mark of this process (VmHWM) is reset, and the merge runs. What the
high-water mark has risen above the baseline is the peak beyond inputs and output.

VmHWM and not `ru_maxrss` of getrusage: the latter cannot be reset, and a process that is started by a larger one
inherits the larger one's maximum.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import contestants
import inputs
from cases import Case

# So few that our methods merge them in the calling thread: buffers that threads keep for the next tensor are to count.
_WARM_UP_ELEMENTS = 1 << 15
# Large blocks come from the system and go back to it at once. By default glibc learns to keep them, in each thread's
# heap, whose end malloc_trim leaves alone: what the warm-up had left there would hide what the merge takes.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def measure(contestant: str, case: Case) -> int:
    """Return the bytes that a fresh process needs beyond inputs and output.

    Raises:
        RuntimeError: It failed; with what it said last.
    """
    command = [sys.executable, str(Path(__file__).resolve()), contestant, json.dumps(asdict(case))]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_ALLOCATOR})
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {contestant} with {case} failed: {result.stderr[-1000:]}")
    return int(result.stdout)


def main(name: str, case: Case) -> None:
    """Measure in this process, and print the result."""
    torch.set_num_threads(case.threads)
    contestant = contestants.BY_NAME[name]
    given = inputs.make(case)
    contestant.merge(given.head(_WARM_UP_ELEMENTS))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    output = torch.ones_like(given.base)
    baseline = _status_bytes("VmRSS")
    del output
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; see proc(5)
    contestant.merge(given)
    print(_status_bytes("VmHWM") - baseline)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main(sys.argv[1], Case(**json.loads(sys.argv[2])))
