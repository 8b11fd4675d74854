"""Every kind of error that ``check`` can find is shown by a recipe whose merge fails or goes wrong."""

from __future__ import annotations

from mergekit_select import kinds
from mergekit_select.findings import Kind, Severity
from tests.check import test_lora, test_models, test_output, test_parameters, test_recipe, test_tensors, test_tokenizers

MODULES = (test_lora, test_models, test_output, test_parameters, test_recipe, test_tensors, test_tokenizers)

# Shown in tests of their own, since they need another environment or text.
ELSEWHERE = {"plugin-inactive", "local-path-like-hub-id", "disk-full", "duplicate-key"}
OF_VERIFY = {"unfinished", "stale", "inconsistent"}


def test_every_kind_of_error_is_shown() -> None:
    shown = {kind for module in MODULES for kind in module.CASES.kinds.values()}
    catalogue = {name: kind for name, kind in vars(kinds).items() if isinstance(kind, Kind)}
    errors = {kind.name for kind in catalogue.values() if kind.severity is Severity.ERROR}
    assert shown | ELSEWHERE == errors - OF_VERIFY
