"""Every kind of error that ``check`` can find is shown by a recipe whose merge fails or goes silently wrong."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from mergekit_select import kinds
from mergekit_select.findings import Severity, UnusableModelError
from mergekit_select.kinds import CATALOGUE
from tests.check import test_lora, test_models, test_output, test_parameters, test_recipe, test_tensors, test_tokenizers
from tests.check.cases import Cases
from tests.support.models import Family

MODULES = (test_lora, test_models, test_output, test_parameters, test_recipe, test_tensors, test_tokenizers)
CASES = {name: module.CASES for module in MODULES for name in module.CASES.kinds}

# Shown in tests of their own, since they need another environment or text.
ELSEWHERE = {"plugin-inactive", "local-path-like-hub-id", "disk-full", "duplicate-key", "lazy-unpickle"}
OF_VERIFY = {"unfinished", "stale", "inconsistent", "random"}
OF_PROVENANCE = {
    "changed",
    "input-changed",
    "input-missing",
    "licence",
    "local-before-hub",
    "local-model",
    "lock-stale",
    "parent-gated",
    "parent-local",
    "parent-missing",
    "remote-code",
    "revision-gone",
    "signature",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "cases"), CASES.items(), ids=CASES)
def test_an_error_makes_the_merge_fail_or_go_silently_wrong(
    name: str, cases: Cases, llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cases.prove(name, llamas, tmp_path)


def test_an_error_comes_home_from_another_process() -> None:
    error = UnusableModelError(kinds.HUB_UNREACHABLE, endpoint="https://a.b", problem="it is down")
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there), there.kind, there.details) == (type(error), str(error), error.kind, error.details)


def test_every_kind_of_error_is_shown() -> None:
    assert len(CASES) == sum(len(module.CASES.kinds) for module in MODULES)
    shown = {kind for module in MODULES for kind in module.CASES.kinds.values()}
    errors = {kind.name for kind in CATALOGUE if kind.severity is Severity.ERROR}
    assert shown | ELSEWHERE | OF_VERIFY | OF_PROVENANCE == errors
