"""What ``mergekit-select merge`` does under faults: killed, refused by the system, short of memory, with moving inputs.

Every case is the command itself. Afterwards the fault is lifted, and the same command has to go on to the same folder.
A fault is silent where the command, ``verify``, transformers or peft takes a folder for finished that is not, byte for
byte, what the undisturbed merge leaves; and it counts as badly told where the command did not say one line.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import peft
import torch
import transformers

import mergekit_select.execution.finish
import mergekit_select.execution.work  # noqa: F401  # before forking, for what it imports
from mergekit_select.provenance.documents import STATEMENT, TENSORS
from tests.execution.killed import count_calls, kill_at
from tests.hostile.processes import Ended, begun, forked
from tests.support.checkpoints import changed
from tests.support.commands import script
from tests.support.models import Family, small_family, write_family, write_tokenizer
from tests.support.recipes import Recipe, written

_SHARD_SIZE = 4_000  # bytes, which makes a dozen files of the small Llamas
_NOBODY = 65_534  # a user without rights


def contents(folder: Path) -> dict[str, bytes]:
    """All files that a merge leaves but the card, which names the folder, and the record, which has times."""
    skipped = ("README.md", "merge_provenance.json")
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if path.name not in skipped and not name.startswith(".merge/")
    }


def _model(folder: Path) -> dict[str, bytes]:
    """What a merge leaves before the record, which is written when the model is whole."""
    return {name: content for name, content in contents(folder).items() if not name.startswith((TENSORS, STATEMENT))}


def large_family(folder: Path) -> Family:
    """A family with tensors of 12.8 MB, which a limit on memory can keep from being merged."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=200_000, num_hidden_layers=1, num_attention_heads=4
    )
    family = write_family(folder, transformers.LlamaForCausalLM(config))
    for model in family.everyone:
        write_tokenizer(model, 64)
    return family


class ExecutorFaults:
    """Runs cases, and counts what came of them.

    Attributes:
        table: Counts by kind of case.
        messages: What the command said, without names and numbers, by kind of case.
        silent: Cases that were taken for finished and are not.
        told_badly: Cases of which the command said nothing, or more than a line.
        stuck: Cases after which the same command did not go on to the same folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        huggingface_hub.constants.HF_HOME = str(folder / "home")  # where digests of files are remembered
        self.family = small_family().copied(folder / "models")
        self.family.root.chmod(0o755)  # one case is another user's
        self.recipe, self.good = self._prepared(self.family.recipe(), "recipe")
        self.table: dict[str, Counter[str]] = {}
        self.messages: dict[str, Counter[str]] = {}
        self.silent: list[str] = []
        self.told_badly: list[str] = []
        self.stuck: list[str] = []
        began = time.monotonic()
        forked(self.merge(folder / "timed"))
        self.seconds = time.monotonic() - began

    def _prepared(self, recipe: Recipe, name: str) -> tuple[Path, dict[str, bytes]]:
        file = written(self.folder / f"{name}.yml", recipe)
        out = self.folder / f"{name}-good"
        ended = forked(self.merge(out, file))
        assert ended.code == 0, ended.said
        return file, contents(out)

    def merge(self, out: Path, recipe: Path | None = None, *options: object) -> Callable[[], object]:
        """Return the command."""
        given = ["merge", recipe or self.recipe, out, "--quiet", "--jobs", 1, "--out-shard-size", _SHARD_SIZE, *options]
        return lambda: script("mergekit-select").main(args=[str(argument) for argument in given])

    def judge(
        self,
        kind: str,
        case: str,
        ended: Ended,
        out: Path,
        recipe: Path | None = None,
        good: dict[str, bytes] | None = None,
    ) -> None:
        """Ask verify, transformers and peft about what is left, go on with the merge, and count it."""
        expected = self.good if good is None else good
        place = f"{kind}, {case}"
        complete = out.exists() and _model(out) == {n: c for n, c in expected.items() if n != TENSORS}
        same = _says_same(out)
        loads, adapter = _loads(out)
        counts = self.table.setdefault(kind, Counter())
        said = [_general(line) for line in ended.said.splitlines()]
        if ended.code >= 0:
            self.messages.setdefault(kind, Counter()).update(said)
        if ended.code > 0 and (len(said) != 1 or not said[0].startswith("Error: ") or ended.code == 70):
            self.told_badly.append(f"{place}: exit {ended.code}: {ended.said}")
        if not complete and (ended.code == 0 or same or loads or adapter):
            self.silent.append(f"{place}: exit {ended.code}, verify {same}, transformers {loads}, peft {adapter}")
        again = forked(self.merge(out, recipe))
        resumed = again.code == 0 and contents(out) == expected
        if not resumed:
            self.stuck.append(f"{place}: exit {again.code}: {again.said}")
        counts["cases"] += 1
        counts[f"exit {ended.code}"] += 1
        counts["complete"] += complete
        counts["verify: same"] += same
        counts["transformers loads it"] += loads
        counts["peft loads it"] += adapter
        counts["goes on to the same folder"] += resumed
        shutil.rmtree(out, ignore_errors=True)

    # Kinds of cases

    def kills(self, count: int) -> None:
        """Kill before calls that change the disk, all of them where there are no more than asked for; and at random."""
        calls = self._calls()
        for number in range(1, calls + 1, max(1, calls // count)):
            out = self.folder / f"call-{number}"
            ended = forked(partial(_disturbed, kill_at(number), self.merge(out)))
            self.judge("killed before a call that changes the disk", str(number), ended, out)
        random_ = random.Random(0)
        for number in range(count):
            out = self.folder / f"time-{number}"
            ended = forked(self.merge(out), random_.uniform(0.001, 1.05 * self.seconds))
            self.judge("killed at a random moment", str(number), ended, out)

    def refusals(self, count: int) -> None:
        """Let the system refuse one call that changes the disk: a quota, a broken disk, a read-only file system."""
        calls = self._calls()
        for code in (errno.EDQUOT, errno.EIO, errno.EROFS):
            for number in range(1, calls + 1, max(1, calls // count)):
                out = self.folder / f"refused-{code}-{number}"
                ended = forked(partial(_disturbed, partial(_refuse, code, number), self.merge(out)))
                self.judge(f"a call is refused: {os.strerror(code)}", str(number), ended, out)

    def processes(self, count: int) -> None:
        """Kill the whole command, with a helper, at random moments, and helpers alone."""
        random_ = random.Random(1)
        for number in range(count):
            out = self.folder / f"process-{number}"
            command = [sys.executable, "-m", "mergekit_select.cli", "merge", str(self.recipe), str(out), "--jobs", "2"]
            command += ["--out-shard-size", str(_SHARD_SIZE)]
            output = self.folder / f"process-{number}.txt"
            with output.open("wb") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
                ends = time.monotonic() + 60
                while not (out / ".merge" / "plan.json").exists() and time.monotonic() < ends:
                    time.sleep(0.01)
                time.sleep(random_.uniform(0, 1))
                helpers = _children(process.pid)
                alone = bool(number % 2 and helpers)
                with suppress(ProcessLookupError):
                    if alone:
                        os.kill(helpers[-1], signal.SIGKILL)
                    else:
                        os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
            kind = "a helper of two processes killed" if alone else "both of two processes killed"
            self.judge(kind, str(number), Ended(code, output.read_text()), out)

    def full_disks(self, count: int) -> None:
        """Merge onto file systems of more and more kilobytes; then make room."""
        kilobytes = sum(-(-len(content) // 4096) * 4 for content in self.good.values())
        for number in range(count):
            size = round(kilobytes * (0.1 + 1.6 * number / count))
            with _mounted(self.folder / f"disk-{number}", f"size={size}k") as mount:
                ended = forked(self.merge(mount / "out"))
                _remount(mount, "size=64m")
                self.judge("full disk", f"{size} KB", ended, mount / "out")

    def read_only(self) -> None:
        """A file system that is read-only from the start or after half of the merge, and a folder of somebody else."""
        with _mounted(self.folder / "read-only", "size=64m,ro") as mount:
            ended = forked(self.merge(mount / "out"))
            _remount(mount, "rw")
            self.judge("read-only", "from the start", ended, mount / "out")
        for share in (1, 2, 3):
            with _mounted(self.folder / f"read-only-{share}", "size=64m") as mount:
                half = forked(self.merge(mount / "out", None, "--shard", f"{share}/3"))
                assert half.code == 0, half.said
                _remount(mount, "ro")
                ended = forked(self.merge(mount / "out"))
                _remount(mount, "rw")
                self.judge("read-only", f"after share {share} of 3", ended, mount / "out")
        (self.folder / "others").mkdir(mode=0o755)
        ended = forked(partial(_as_nobody, self.merge(self.folder / "others" / "out")))
        self.judge("read-only", "a folder of somebody else", ended, self.folder / "others" / "out")

    def limits(self) -> None:
        """A limit on the size of files, on address space, and on the memory of a control group."""
        for kilobytes in (1, 2, 3, 4, 5, 6, 8, 10, 20, 60):
            out = self.folder / f"size-{kilobytes}"
            ended = forked(partial(_limited, resource.RLIMIT_FSIZE, kilobytes << 10, self.merge(out)))
            self.judge("largest file allowed", f"{kilobytes} KB", ended, out)
        large = large_family(self.folder / "large")
        recipe, good = self._prepared(large.recipe(), "large")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for megabytes in (0, 1, 4, 16, 32, 64, 96, 128, 192, 256, 512):
            out = self.folder / f"address-space-{megabytes}"
            value = used + (megabytes << 20)
            ended = forked(partial(_limited, resource.RLIMIT_AS, value, self.merge(out, recipe)))
            self.judge("address space", f"{megabytes} MB more", ended, out, recipe, good)
        for megabytes in (4, 8, 16, 32, 64, 96, 128, 192, 256):
            out = self.folder / f"group-{megabytes}"
            with _control_group(megabytes << 20) as group:
                ended = forked(partial(_in_group, group, self.merge(out, recipe)))
            self.judge("memory of a control group", f"{megabytes} MB", ended, out, recipe, good)

    def two_at_once(self, count: int) -> None:
        """Begin the same command again while it runs."""
        for number in range(count):
            out = self.folder / f"two-{number}"
            first = begun(self.merge(out))
            time.sleep(self.seconds * number / count)
            second = forked(self.merge(out))
            ends = sorted((first.end(), second), key=lambda ended: ended.code)
            assert ends[0].code == 0, ends
            kind = "two at once"
            self.judge(kind, str(number), ends[1] if ends[1].code else ends[0], out)

    def clocks(self) -> None:
        """Inputs of the future and of before 1970, and a clock that jumps at every look."""
        for when in (-1_000_000_000, 0, 2**31 + 5, 2**33):
            for path in self.family.root.rglob("*"):
                os.utime(path, (when, when))
            out = self.folder / f"clock-{when}"
            self.judge("clock", f"inputs of {when}", forked(self.merge(out)), out)
        for number in range(5):
            out = self.folder / f"jumps-{number}"
            self.judge("clock", "jumps", forked(partial(_jumping, number, self.merge(out))), out)

    def moving_inputs(self, count: int) -> None:
        """Change an input at a random moment; what comes out is of the inputs before, or of those after."""
        own = self.folder / "moving"
        random_ = random.Random(2)
        for number in range(count):
            shutil.rmtree(own, ignore_errors=True)
            family = small_family().copied(own)
            recipe = written(self.folder / f"moving-{number}.yml", family.recipe())
            file = family.subs[1] / "model.safetensors"
            before = file.read_bytes()
            way = list(_WAYS)[number % len(_WAYS)]
            out = self.folder / f"moved-{number}"
            running = begun(self.merge(out, recipe))
            time.sleep(random_.uniform(0, self.seconds))
            _WAYS[way](file)
            self._judge_moved(f"an input is {way}", number, running.end(), out, recipe, before)

    def _judge_moved(self, kind: str, number: int, ended: Ended, out: Path, recipe: Path, before: bytes) -> None:
        place = f"{kind}, {number}"
        file = recipe.parent / "moving" / "b" / "model.safetensors"
        counts = self.table.setdefault(kind, Counter())
        said = [_general(line) for line in ended.said.splitlines()]
        self.messages.setdefault(kind, Counter()).update(said)
        same_now, loads = _says_same(out), _loads(out)[0]
        now = file.read_bytes() if file.exists() else b""
        recorded = _recorded_digest(out)
        of_before = self._merged_of(file, before, recipe, out) if ended.code == 0 or loads else False
        of_now = self._merged_of(file, now, recipe, out) if ended.code == 0 or loads else False
        if (ended.code == 0 or loads) and not (of_before or of_now):
            self.silent.append(f"{place}: exit {ended.code}, transformers {loads}, of neither inputs")
        if same_now and not of_now:
            self.silent.append(f"{place}: verify says same of other inputs")
        if ended.code == 0 and recorded != _digest(before if of_before else now):
            self.silent.append(f"{place}: the record is of other inputs")
        if ended.code > 0 and (len(said) != 1 or not said[0].startswith("Error: ") or ended.code == 70):
            self.told_badly.append(f"{place}: exit {ended.code}: {ended.said}")
        counts["cases"] += 1
        counts[f"exit {ended.code}"] += 1
        counts["of the inputs before"] += of_before
        counts["of the inputs after"] += of_now and not of_before
        counts["verify: same"] += same_now
        counts["transformers loads it"] += loads
        shutil.rmtree(out, ignore_errors=True)

    def _merged_of(self, file: Path, content: bytes, recipe: Path, out: Path) -> bool:
        """Whether an output is what inputs with this content give."""
        if file.exists():
            file.unlink()
        file.write_bytes(content)
        fresh = self.folder / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        ended = forked(self.merge(fresh, recipe, "--no-provenance"))
        return ended.code == 0 and _model(fresh) == _model(out)

    def _calls(self) -> int:
        """Return how many calls that change the disk the merge makes."""
        note = self.folder / "calls"

        def write_down(call: int) -> None:
            descriptor = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.write(descriptor, str(call).encode())
            os.close(descriptor)

        ended = forked(partial(_disturbed, write_down, self.merge(self.folder / "counted")))
        assert ended.code == 0, ended.said
        shutil.rmtree(self.folder / "counted")
        return int(note.read_text())


def _rewritten(file: Path) -> None:
    """Write other tensors into the file where it lies."""
    other = file.parent.parent / "other"
    shutil.copytree(file.parent, other)
    changed(other, _moved)
    with file.open("r+b") as place:
        place.write((other / file.name).read_bytes())
    shutil.rmtree(other)


def _rewritten_with_old_time(file: Path) -> None:
    status = file.stat()
    _rewritten(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replaced(file: Path) -> None:
    other = file.parent.parent / "other"
    shutil.copytree(file.parent, other)
    changed(other, _moved)
    (other / file.name).replace(file)
    shutil.rmtree(other)


def _replaced_with_old_time(file: Path) -> None:
    status = file.stat()
    other = file.parent.parent / "other"
    shutil.copytree(file.parent, other)
    changed(other, _moved)
    os.utime(other / file.name, ns=(status.st_atime_ns, status.st_mtime_ns))
    (other / file.name).replace(file)
    shutil.rmtree(other)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _moved(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor + 1 for name, tensor in tensors.items()})


_WAYS: dict[str, Callable[[Path], object]] = {
    "rewritten where it lies": _rewritten,
    "rewritten where it lies, its old time restored": _rewritten_with_old_time,
    "replaced": _replaced,
    "replaced by one of the same time": _replaced_with_old_time,
    "cut off": _cut,
    "removed": Path.unlink,
}


def _says_same(out: Path) -> bool:
    return forked(partial(script("mergekit-select").main, ["verify", str(out)])).code == 0


def _loads(out: Path) -> tuple[bool, bool]:
    """Whether transformers, and whether peft, loads a folder."""
    if not out.exists():
        return False, False
    model: Any = transformers.AutoModelForCausalLM
    adapter: Any = peft.AutoPeftModelForCausalLM

    def load() -> None:
        loaded = 0
        for bit, kind in ((1, model), (2, adapter)):
            with suppress(Exception):
                kind.from_pretrained(str(out))
                loaded += bit
        sys.exit(loaded)

    code = max(0, forked(load).code)  # killed, it has loaded nothing
    return bool(code & 1), bool(code & 2)


def _general(line: str) -> str:
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"(/[\w.-]+)+", "PATH", line))


def _disturbed(act: Callable[[int], None], run: Callable[[], object]) -> None:
    count_calls(act)
    run()


def _refuse(code: int, number: int, call: int) -> None:
    if call == number:
        raise OSError(code, os.strerror(code), "the file")


def _as_nobody(run: Callable[[], object]) -> None:
    os.setuid(_NOBODY)
    run()


def _limited(limit: int, value: int, run: Callable[[], object]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(limit, (value, value))
    run()


def _in_group(group: Path, run: Callable[[], object]) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    run()


def _jumping(seed: int, run: Callable[[], object]) -> None:
    random_, clock = random.Random(seed), time.time
    time.time = lambda: clock() + random_.choice((-1, 1)) * random_.choice((1, 3_600, 30_000_000))
    run()


def _children(process: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == process and "spawn_main" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return found


@contextmanager
def _mounted(mount: Path, options: str) -> Iterator[Path]:
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def _remount(mount: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(mount)], check=True)


@contextmanager
def _control_group(limit: int) -> Iterator[Path]:
    group = Path("/sys/fs/cgroup/memory", f"mergekit-select-{os.getpid()}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def _recorded_digest(out: Path) -> str | None:
    """Return the digest that an output's record gives for the input that moves."""
    path = out / "merge_provenance.json"
    if not path.exists():
        return None
    inputs = json.loads(path.read_text())["predicate"]["buildDefinition"]["resolvedDependencies"]
    found = [entry for entry in inputs if entry["uri"].endswith("/b#model.safetensors")]
    return str(found[0]["digest"]["sha256"]) if found else None


def _digest(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
