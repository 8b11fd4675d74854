"""Both methods on the architectures that mergekit's users bring, from the files' bytes to the logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.compatibility import shows
from tests.support import expectation
from tests.support.architectures import GAPS, WORKING, Architecture, write_models
from tests.support.expectation import Stored
from tests.support.models import Family
from tests.support.recipes import METHODS, RESAMPLING, SELECTION, merge

TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}
LINEAR = {"weight": 1.0}

MakeFamily = Callable[[Architecture], Family]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> MakeFamily:
    """Base and sub-models of an architecture, made once."""

    @cache
    def make(architecture: Architecture) -> Family:
        return write_models(architecture, tmp_path_factory.mktemp(re.sub(r"\W+", "-", architecture.title)))

    return make


@shows("Architectures", lambda architecture: architecture.title, note=lambda architecture: architecture.note)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", WORKING, ids=str)
def test_bits_keys_and_logits_of_an_architecture(
    family: MakeFamily, tmp_path: Path, architecture: Architecture, method: str
) -> None:
    models = family(architecture)
    out = merge(models.recipe(method, parameters={"seed": 11}), tmp_path / "out", copy_tokenizer=False)

    found = expectation.read(out)
    base_tensors, *sub_tensors = [architecture.aligned(expectation.read(folder)) for folder in models.everyone]
    expectation.assert_taken_from(found, sub_tensors if method == SELECTION else [*sub_tensors, base_tensors])
    wanted = expectation.expected(sub_tensors, base_tensors if method == RESAMPLING else None, seed=11)
    expectation.assert_same(found, wanted)

    loaded, report = architecture.model.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    assert torch.equal(logits(loaded, architecture), logits(by_hand(architecture, wanted), architecture))


def logits(model: Any, architecture: Architecture) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**architecture.inputs).logits
    assert found.isfinite().all()
    return found


def by_hand(architecture: Architecture, tensors: dict[str, Stored]) -> Any:
    """The model, filled with the expected tensors without transformers' loader; what stays missing is tied."""
    model = architecture.model(architecture.config).float()
    state = {}
    for name, tensor in tensors.items():
        if not (architecture.ignored and re.search(architecture.ignored, name)):
            value = torch.from_numpy(tensor.bits.astype(np.int16 if tensor.dtype == "BF16" else np.int32))
            state[architecture.state_name(name)] = value.view(TORCH[tensor.dtype]).view(tensor.shape)
    missing, unexpected = model.load_state_dict(state, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(parameters[name]) for name in state if name in parameters}
    assert not unexpected
    assert all(id(parameters[name]) in filled for name in missing), missing
    return model


@shows("Architectures", lambda architecture: architecture.title, note=lambda architecture: architecture.note, gap=True)
@pytest.mark.parametrize("architecture", GAPS, ids=str)
def test_what_mergekit_cannot_merge_fails_with_linear_too(
    family: MakeFamily, tmp_path: Path, architecture: Architecture
) -> None:
    models = family(architecture)
    for method in [*METHODS, "linear"]:
        config = models.recipe(method, parameters=LINEAR if method == "linear" else {"seed": 11})
        if architecture.gap:
            with pytest.raises(RuntimeError, match=architecture.gap):
                merge(config, tmp_path / method, copy_tokenizer=False)
        else:
            out = merge(config, tmp_path / method, copy_tokenizer=False)
            _, report = architecture.model.from_pretrained(out, output_loading_info=True)
            assert architecture.not_loaded in report["missing_keys"]
            # the inputs themselves load, so it is the merge that loses them
            _, report = architecture.model.from_pretrained(models.subs[0], output_loading_info=True)
            assert not report["missing_keys"]
