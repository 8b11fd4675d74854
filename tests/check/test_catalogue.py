"""Every kind of error that ``check`` can find is shown by a recipe whose merge fails or goes wrong."""

from __future__ import annotations

from pathlib import Path

import mergekit_select
from mergekit_select.findings import KINDS
from tests.check import test_lora, test_models, test_output, test_parameters, test_recipe, test_tensors, test_tokenizers

# Shown in tests of their own, since they need another environment or text.
ELSEWHERE = {"plugin-inactive", "local-path-like-hub-id", "disk-full", "duplicate-key"}
NEVER_ERRORS = {
    "base-parameter-ignored", "no-base-model", "tokenizer-union", "hub-id-not-pinned", "model-pickled",
    "model-ambiguous", "remote-code", "same-file", "tensor-partial", "integer-tensor",
    "dtypes-mixed", "base-dtype", "ties-differ", "tokenizer-missing", "not-known", "out-name", "memory",
}  # fmt: skip


def test_every_kind_of_error_is_shown() -> None:
    modules = (test_lora, test_models, test_output, test_parameters, test_recipe, test_tensors, test_tokenizers)
    shown = {kind for module in modules for kind in module.CASES.kinds.values()}
    assert shown | ELSEWHERE | NEVER_ERRORS == set(KINDS)
    source = "".join(file.read_text() for file in Path(mergekit_select.__file__).parent.rglob("*.py"))
    for kind in NEVER_ERRORS:
        assert f'error("{kind}"' not in source
        assert f'error(\n                "{kind}"' not in source
