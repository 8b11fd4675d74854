"""``make fuzz``: many mutated files, each with limits on time and memory; any other exception than ours is a failure.

A case is named by its target and number, and comes out again with ``--target NAME --first NUMBER --count 1``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from tests.hostile.generators import Cases

SECONDS = 10  # of a case
MEMORY = 4 << 30  # bytes of address space that all cases of a process may add
# Shares of the cases, by what they cost: reading takes a millisecond, a check thirty, a verification a second.
SHARES = {
    "recipe text": 0.4,
    "header": 0.3,
    "index": 0.2,
    "recipe": 0.05,
    "config": 0.025,
    "tokenizer": 0.02,
    "output": 0.005,
}


class TooSlowError(BaseException):
    """A case took more than ``SECONDS``."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise ``TooSlowError`` in a block that takes longer."""

    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(cases: Cases, target: str, first: int, count: int) -> tuple[Counter[str], list[str]]:
    """Run cases of a target; return how they came out, and a traceback for each failure."""
    outcomes: Counter[str] = Counter()
    failures = []
    feed = cases.targets()[target]
    for number in range(first, first + count):
        try:
            with limited(SECONDS):
                outcomes[feed(random.Random(f"{target} {number}"))] += 1
        except (Exception, TooSlowError) as error:
            outcomes["failed"] += 1
            failures.append(f"{target} {number}: {type(error).__name__}\n{traceback.format_exc()}")
    return outcomes, failures


def main() -> None:
    """Run what the arguments say, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--target", choices=SHARES)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        cases = Cases(Path(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for target, share in SHARES.items():
            if arguments.target not in (None, target):
                continue
            count = arguments.count if arguments.target else round(arguments.count * share)
            began = time.monotonic()
            outcomes, failures = run(cases, target, arguments.first, count)
            failed += len(failures)
            shown = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
            print(f"{target}: {count} cases in {time.monotonic() - began:.0f} s: {shown}", flush=True)
            for failure in failures[:5]:
                print(failure.encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
