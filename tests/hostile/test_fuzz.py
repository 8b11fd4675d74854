"""The fast part of ``make fuzz``: fixed cases of every target, and those that failed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.fuzz import SHARES, run
from tests.hostile.generators import Cases

COUNTS = {"recipe text": 500, "header": 500, "index": 300, "recipe": 150, "config": 60, "tokenizer": 60, "output": 12}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("hostile"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", SHARES)
def test_nothing_but_our_errors_comes_out(target: str, cases: Cases) -> None:
    outcomes, failures = run(cases, target, 0, COUNTS[target])
    assert not failures, failures[0]
    assert outcomes["refused"] + outcomes["answered"] == COUNTS[target]
    assert outcomes["refused"] > 0 or target in ("recipe", "config", "tokenizer")


def test_a_failure_would_be_seen(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError

    monkeypatch.setattr("tests.hostile.generators.read_recipes", fail)
    outcomes, failures = run(cases, "recipe text", 0, 3)
    assert outcomes == {"failed": 3}
    assert len(failures) == 3


def test_the_folder_is_as_it_was(cases: Cases, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in cases.folder.rglob("*") if path.is_file()}
    for target in SHARES:
        run(cases, target, 1000, 3)
    assert before == {path: path.read_bytes() for path in cases.folder.rglob("*") if path.is_file()}
