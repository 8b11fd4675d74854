"""The fast part of ``make faults``: a few cases of every kind that needs no rights."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("merges are forked, and limited by means of Linux", allow_module_level=True)

from tqdm import tqdm

from tests.hostile.executor_faults import ExecutorFaults
from tests.hostile.processes import forked


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExecutorFaults]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # the lock of its thread would be held there for ever
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield ExecutorFaults(tmp_path)
    torch.set_num_threads(threads)


def test_faults_are_seen_and_gone_on_from(faults: ExecutorFaults) -> None:
    faults.kills(2)
    faults.refusals(1)
    faults.two_at_once(1)
    faults.moving_inputs(2)
    assert not faults.silent
    assert not faults.told_badly
    assert not faults.stuck
    killed, refused = "killed before a call that changes the disk", "a call is refused: Disk quota exceeded"
    assert faults.table[killed]["exit -9"] >= 2
    assert faults.table[killed]["goes on to the same folder"] >= 2
    assert faults.table[refused]["exit 2"] >= 1
    assert sum(counts["cases"] for kind, counts in faults.table.items() if kind.startswith("an input is")) == 2


def test_a_silent_fault_would_be_seen(faults: ExecutorFaults) -> None:
    out = faults.folder / "out"
    ended = forked(faults.merge(out))
    (out / "tokenizer.json").unlink()
    faults.judge("a kind", "a case", ended, out)
    assert faults.silent == ["a kind, a case: exit 0, verify False, transformers True, peft False"]
    assert len(faults.stuck) == 1
