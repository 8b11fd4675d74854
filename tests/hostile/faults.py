"""``make faults``: merges that are killed, meet a full disk, or run twice at once; what is left, and who sees it.

Stock merges stand here, those of ``mergekit-select merge`` in ``executor_faults``. A fault of a stock merge is silent
where ``verify`` says SAME of a folder that is not, file by file, what the undisturbed merge leaves. Needs Linux, and
for full disks and limits on memory, the rights of root.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tqdm import tqdm

from mergekit_select.errors import MergekitSelectError
from mergekit_select.verification import verify
from tests.hostile.executor_faults import ExecutorFaults
from tests.hostile.processes import Ended, begun, forked
from tests.support.models import small_family
from tests.support.recipes import Recipe, merge

_WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.copyfile")  # what Python can stop before; Rust cannot


def killed_at_event(number: int, run: Callable[[], object]) -> Callable[[], object]:
    """Return a function that kills its process before the numbered file operation."""

    def stop() -> None:
        seen = 0

        def hook(event: str, _arguments: object) -> None:
            nonlocal seen
            if event in _WRITES:
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        run()

    return stop


def contents(folder: Path) -> dict[str, bytes]:
    """All files that a merge leaves but the card, which names the folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "README.md"
    }


class Faults:
    """Runs cases, and counts what came of them."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        self.options = options
        self.recipe: Recipe = small_family().copied(folder / "models").recipe()
        began = time.monotonic()
        forked(self.merge(folder / "good"))
        self.seconds = time.monotonic() - began
        self.good = contents(folder / "good")
        self.silent: list[str] = []
        self.table: dict[str, Counter[str]] = {}

    def merge(self, out: Path) -> Callable[[], object]:
        """Return the undisturbed merge into a folder."""
        return lambda: merge(self.recipe, out, **self.options)

    def judge(self, kind: str, case: str, ended: Ended, out: Path) -> None:
        """Ask verify and transformers about what is left, and count it."""
        complete = out.exists() and contents(out) == self.good
        said = forked(partial(_require_same, out)).code if out.exists() else 2
        loads = out.exists() and forked(partial(transformers.AutoModelForCausalLM.from_pretrained, out)).code == 0
        if said == 0 and not complete and not self._only_temporary(out):
            self.silent.append(f"{kind} {case}")
        counts = self.table.setdefault(kind, Counter())
        counts["cases"] += 1
        counts["merge exits 0"] += ended.code == 0
        counts["complete"] += complete
        counts["verify: same"] += said == 0
        counts["transformers loads it"] += loads
        counts["loads, and is not complete"] += loads and not complete
        counts["exit 0, and is not complete"] += ended.code == 0 and not complete
        shutil.rmtree(out, ignore_errors=True)

    def _only_temporary(self, out: Path) -> bool:
        left = contents(out)
        return {n: left[n] for n in left if not n.startswith(".tmp")} == self.good

    def kills(self, count: int) -> None:
        """Kill before every file operation that Python makes, then at random moments."""
        for number in range(1, count + 1):
            out = self.folder / f"event-{number}"
            ended = forked(killed_at_event(number, self.merge(out)))
            self.judge("killed before a file operation", str(number), ended, out)
            if ended.code == 0:
                break
        random_ = random.Random(0)
        for number in range(count):
            out = self.folder / f"time-{number}"
            ended = forked(self.merge(out), random_.uniform(0.01, 1.1 * self.seconds))
            self.judge("killed at a random moment", str(number), ended, out)

    def full_disks(self, count: int) -> None:
        """Merge onto file systems of more and more kilobytes."""
        size = sum(map(len, self.good.values()))
        for number in range(count):
            mount = self.folder / f"disk-{number}"
            mount.mkdir()
            kilobytes = round(size / 1000 * (0.2 + 1.3 * number / count))
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(mount)], check=True)
            try:
                # the recipe is written beside the output, which a full disk would stop first
                ended = forked(partial(self._elsewhere, mount / "out"))
                self.judge("full disk", f"{kilobytes} KB", ended, mount / "out")
            finally:
                subprocess.run(["umount", str(mount)], check=True)

    def _elsewhere(self, out: Path) -> None:
        link = self.folder / f"link-{out.parent.name}"
        out.mkdir()
        link.symlink_to(out)
        merge(self.recipe, link, **self.options)

    def other_limits(self) -> None:
        """A folder without permission, a limit on the size of files, on memory, and two merges at once."""
        for kilobytes in (1, 10, 40, 60):
            out = self.folder / f"size-{kilobytes}"
            ended = forked(partial(self._limited, resource.RLIMIT_FSIZE, kilobytes << 10, out))
            self.judge("largest file allowed", f"{kilobytes} KB", ended, out)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for megabytes in (1, 16, 64, 256):
            out = self.folder / f"memory-{megabytes}"
            ended = forked(partial(self._limited, resource.RLIMIT_AS, used + (megabytes << 20), out))
            self.judge("address space", f"{megabytes} MB more", ended, out)
        for number in range(10):
            out = self.folder / f"two-{number}"
            first = begun(self.merge(out))
            time.sleep(self.seconds * number / 20)
            ended = forked(self.merge(out))
            first.end()
            self.judge("two merges at once", str(number), ended, out)

    def _limited(self, limit: int, value: int, out: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        source = out.parent / f"{out.name}.yml"
        source.write_text("")
        resource.setrlimit(limit, (value, value))
        merge(self.recipe, out, **self.options)


def _require_same(out: Path) -> None:
    if not verify(out).same:
        raise MergekitSelectError("not the same")


def main() -> None:
    """Run all cases, and print a table; exit 1 where a fault was silent, badly told or not gone on from."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="at random moments, and at most before file operations")
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--only", choices=("stock", "executor"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread's lock would be held in a forked process for ever
    failed = False
    if arguments.only != "executor":
        failed |= _stock(arguments.kills, arguments.disks)
    if arguments.only != "stock":
        failed |= _executor(arguments.kills, arguments.disks)
    sys.exit(failed)


def _stock(kills: int, disks: int) -> bool:
    silent = []
    for options in ({}, {"out_shard_size": 8_000}):
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            faults = Faults(Path(folder), dict(options))
            faults.kills(kills)
            faults.full_disks(disks)
            faults.other_limits()
            print(f"merge with {options or 'no options'}, {len(faults.good)} files, {faults.seconds:.2f} s")
            _print(faults.table)
            silent += faults.silent
    print(f"silent: {silent or 'none'}")
    return bool(silent)


def _executor(kills: int, disks: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        os.chmod(folder, 0o755)  # one case is another user's
        faults = ExecutorFaults(Path(folder))
        print(f"mergekit-select merge, {len(faults.good)} files, {faults.seconds:.2f} s")
        faults.kills(kills)
        faults.refusals(kills)
        faults.processes(max(1, kills // 10))
        faults.full_disks(disks)
        faults.read_only()
        faults.limits()
        faults.two_at_once(max(1, kills // 10))
        faults.clocks()
        faults.moving_inputs(max(1, kills // 2))
        _print(faults.table)
    for kind, messages in faults.messages.items():
        for message, number in messages.most_common():
            print(f"  {kind}: {number} times: {message}")
    found = {"silent": faults.silent, "badly told": faults.told_badly, "not gone on from": faults.stuck}
    for what, cases in found.items():
        print(f"{what}: {len(cases) or 'none'}", *cases, sep="\n  ")
    return any(found.values())


def _print(table: Mapping[str, Mapping[str, int]]) -> None:
    for kind, counts in table.items():
        print(f"  {kind}: " + ", ".join(f"{number} {what}" for what, number in counts.items()), flush=True)


if __name__ == "__main__":
    main()
