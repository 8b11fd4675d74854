"""Put each mutant of the modules named in pyproject.toml into a copy of this tree, and run the tests that should fail.

    python -m tests.mutants [MODULE ...] [--copy FOLDER] [--every N] [--again]

A module is named by a part of its path. Results are kept beside the copy, one line of JSON a mutant, and those of an
unchanged module are not computed again.

Each run of tests is a fork of this process, which has imported all that is slow to import and nothing of the package.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


from tests.mutants.operators import Mutant, mutants

PACKAGE = Path("merge_methods", "mergekit_select")
KERNEL = PACKAGE / "selection" / "kernel.c"
CPU_SECONDS = 200  # of one run of tests where nothing is wrong
WALL_SECONDS = 1200  # for those that wait without end; machines are busy
OPTIONS = ("-x", "-q", "--tb=no", "--assert=plain", "-pno:cacheprovider", "--hypothesis-profile=mutants")


def main() -> None:
    """Report how many mutants of each module were killed, and which survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="parts of paths (default: all)")
    parser.add_argument("--copy", type=Path, default=Path("build", "mutants", "tree"), help="where to work")
    parser.add_argument("--every", type=int, default=1, help="try one of so many mutants, evenly spread (default: 1)")
    parser.add_argument("--again", action="store_true", help="try survivors of an earlier run, as after adding tests")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tests: dict[str, list[str]] = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutants"]
    copy = asked.copy.absolute()
    _copy(copy)
    _preload()
    survived = 0
    for module, patterns in sorted(_chosen(copy, tests, asked.modules).items()):
        survived += _of_module(copy, module, patterns, asked.every, asked.again)
    sys.exit(survived > 0)


def _copy(copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], capture_output=True, check=True
    )
    libraries = [str(path) for path in (PACKAGE / "selection").glob("libkernel.*")]
    for name in [*files.stdout.decode().rstrip("\0").split("\0"), *libraries]:
        if Path(name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, copy / name)


def _preload() -> None:
    os.environ["MERGEKIT_SELECT_DISABLE"] = "1"  # each fork registers the methods of its own copy
    import mergekit.merge
    import mergekit.merge_methods
    import numpy
    import pydantic
    import pytest
    import torch
    import transformers.modeling_utils
    from hypothesis import Phase, settings

    del os.environ["MERGEKIT_SELECT_DISABLE"]
    assert all((mergekit.merge, numpy, pydantic, pytest, torch, transformers.modeling_utils))
    # Neither random nor with a memory of what failed before, and without a search for the smallest example that fails.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", derandomize=True, database=None, deadline=None, phases=phases)
    gc.freeze()  # pytest collects garbage at its end, and would touch all of this in each fork


def _chosen(copy: Path, tests: dict[str, list[str]], parts: list[str]) -> dict[Path, list[str]]:
    """Return the modules, and the tests that each should pass; the first pattern that fits a module counts."""
    found: dict[Path, list[str]] = {}
    for pattern, chosen in tests.items():
        for path in sorted((copy / PACKAGE).glob(pattern)):
            module = path.relative_to(copy)
            if not parts or any(part in str(module) for part in parts):
                found.setdefault(module, chosen)
    return found


def _of_module(copy: Path, module: Path, tests: list[str], every: int, again: bool) -> int:
    """Try all mutants of a module, and return how many survived."""
    path = copy / module
    original = path.read_text()
    digest = hashlib.sha256(original.encode()).hexdigest()
    record = copy.parent / "results" / f"{module.stem}-{digest[:12]}.jsonl"
    record.parent.mkdir(exist_ok=True)
    known = {}
    if record.exists():
        known = {line["id"]: line for line in map(json.loads, record.read_text().splitlines())}
    if "none" not in known or again:
        outcome, taken, _ = _outcome(copy, module, tests, CPU_SECONDS, Counter())
        if outcome != "survived":
            print(f"{module}: not tried, since its tests fail without a mutant: {outcome}, see {copy / 'tests.log'}")
            return 1
        known["none"] = {"id": "none", "seconds": taken}
        _write(record, known["none"])
    most = 3 + 2 * int(known["none"]["seconds"])
    kills = Counter(line["killer"] for line in known.values() if line.get("killer"))
    outcomes: Counter[str] = Counter()
    for mutant in itertools.islice(mutants(path), 0, None, every):
        identity = hashlib.sha256(mutant.source.encode()).hexdigest()
        if identity not in known or (again and known[identity]["outcome"] == "survived"):
            path.write_text(mutant.source)
            try:
                outcome, taken, killer = _outcome(copy, module, tests, most, kills)
            finally:
                path.write_text(original)
            answer = {"id": identity, "outcome": outcome, "seconds": taken, "killer": killer}
            known[identity] = {**answer, **_described(mutant)}
            kills.update([killer] if killer else [])
            _write(record, known[identity])
        outcome = known[identity]["outcome"]
        outcomes[outcome] += 1
        if outcome == "survived":
            change = f"    - {mutant.before}\n    + {mutant.after}"
            print(f"  {module}:{mutant.line}: {mutant.operator}\n{change}", flush=True)
    if module == KERNEL:
        _compiled(copy)
    outcomes.pop("not compiled", None)
    total = outcomes.total()
    print(f"{module}: {total - outcomes['survived']} of {total} killed {dict(outcomes)}", flush=True)
    return outcomes["survived"]


def _write(record: Path, line: dict[str, Any]) -> None:
    with record.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def _described(mutant: Mutant) -> dict[str, Any]:
    return {"operator": mutant.operator, "line": mutant.line, "before": mutant.before, "after": mutant.after}


def _outcome(copy: Path, module: Path, tests: list[str], most: int, kills: Counter[str]) -> tuple[str, float, str]:
    """Run the tests in a fork; return what came of it, how many seconds of the processor they took, which failed."""
    if module == KERNEL and not _compiled(copy):
        return "not compiled", 0.0, ""
    killer = copy / "killer.txt"
    killer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        _test(copy, tests, most, _Order(kills, killer))
    deadline = time.monotonic() + WALL_SECONDS
    try:
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                return "killed by waiting", float(WALL_SECONDS), ""
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # also what its tests left running
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
    seconds = round(usage.ru_utime + usage.ru_stime, 1)
    if os.WIFSIGNALED(status):
        return ("killed by time" if os.WTERMSIG(status) == signal.SIGXCPU else "killed by signal"), seconds, ""
    outcome = {0: "survived", 5: "untested"}.get(os.WEXITSTATUS(status), "killed")
    return outcome, seconds, killer.read_text() if killer.exists() else ""


class _Order:
    """Has pytest begin with the tests that killed most mutants of this module, and notes which one fails."""

    def __init__(self, kills: Counter[str], killer: Path):
        self.kills = kills
        self.killer = killer

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: -self.kills[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.killer.write_text(report.nodeid)


def _test(copy: Path, tests: list[str], most: int, order: _Order) -> None:
    """Run the tests in this process, which ends with them."""
    import pytest

    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 5))
    os.chdir(copy)
    log = os.open("tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    paths = [str(copy / "merge_methods"), str(copy), str(copy / "tests")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    # Two mutants of a second have the same time of change, by which bytecode is told to be stale.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = paths + [path for path in sys.path if Path(path).resolve() != Path.cwd().parent]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mergekit_select", "tests")]:
        del sys.modules[name]
    code = 1
    try:
        from mergekit_select import _startup

        _startup.install()
        code = int(pytest.main([*OPTIONS, *tests], plugins=[order]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _compiled(copy: Path) -> bool:
    # Quickly, and for one kind of processor: every width is compiled for each.
    command = [sys.executable, "hatch_build.py", str(KERNEL.parent), "-O1", "-w", "-DONE_TARGET"]
    return subprocess.run(command, cwd=copy, capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
