"""Both methods on the architectures that mergekit's users bring, from the files' bytes to the logits."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import expectation
import reference
from architectures import GAPS, WORKING, Architecture, write_family
from checkpoints import merge_here, recipe
from compatibility import METHODS, shows
from expectation import Stored

SELECTION, RESAMPLING = METHODS
TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}
LINEAR = {"weight": 1.0}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Base and sub-models of an architecture, made once."""

    @cache
    def make(architecture: Architecture) -> tuple[Path, list[Path]]:
        return write_family(architecture, tmp_path_factory.mktemp(re.sub(r"\W+", "-", architecture.title)))

    return make


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_expectation_in_numpy_is_the_reference(data):
    count, models = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    columns = st.lists(st.integers(0, 2), min_size=count, max_size=count)
    subs, base = [data.draw(columns) for _ in range(models)], data.draw(st.none() | columns)
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=models, max_size=models).filter(any))
    options = dict(weights=weights, seed=data.draw(st.integers(0, 2**63 - 1)), name=data.draw(st.sampled_from("abé")))
    options |= dict(rounds=data.draw(st.none() | st.integers(1, 6)))
    wanted = reference.merge(subs, base, **options)[0]
    found = expectation.merge([np.array(sub) for sub in subs], None if base is None else np.array(base), **options)
    assert found.tolist() == wanted


def test_the_reader_reads_what_safetensors_writes(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.tensor([[1.0, -0.0]]), "b": torch.tensor(2.0, dtype=torch.bfloat16), "c": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = expectation.read(tmp_path)
    assert {name: (t.dtype, t.shape, t.bits.tolist()) for name, t in found.items()} == {
        "a": ("F32", (1, 2), [0x3F800000, 0x80000000]),
        "b": ("BF16", (), [0x4000]),
        "c": ("F32", (0, 3), []),
    }


@shows("Architectures", lambda architecture: architecture.title, note=lambda architecture: architecture.note)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", WORKING, ids=str)
def test_bits_keys_and_logits_of_an_architecture(family, tmp_path, architecture, method):
    base, subs = family(architecture)
    out = merge_here(tmp_path, recipe(method, base, subs, parameters={"seed": 11}), copy_tokenizer=False)

    found = expectation.read(out)
    base_tensors, *sub_tensors = [architecture.aligned(expectation.read(folder)) for folder in (base, *subs)]
    expectation.assert_taken_from(found, sub_tensors if method == SELECTION else [*sub_tensors, base_tensors])
    wanted = expectation.expected(sub_tensors, base_tensors if method == RESAMPLING else None, seed=11)
    expectation.assert_same(found, wanted)

    loaded, report = architecture.model.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    assert torch.equal(logits(loaded, architecture), logits(by_hand(architecture, wanted), architecture))


def logits(model, architecture: Architecture) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**architecture.inputs).logits
    assert found.isfinite().all()
    return found


def by_hand(architecture: Architecture, tensors: dict[str, Stored]):
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


def given_method(method: str, base: Path, subs: list[Path]) -> dict:
    return recipe(method, base, subs, parameters=LINEAR if method == "linear" else {"seed": 11})


@shows("Architectures", lambda architecture: architecture.title, note=lambda architecture: architecture.note, gap=True)
@pytest.mark.parametrize("architecture", GAPS, ids=str)
def test_what_mergekit_cannot_merge_fails_with_linear_too(family, tmp_path, architecture):
    base, subs = family(architecture)
    for method in [*METHODS, "linear"]:
        config = given_method(method, base, subs)
        if architecture.gap:
            with pytest.raises(RuntimeError, match=architecture.gap):
                merge_here(tmp_path, config, name=method, copy_tokenizer=False)
        else:
            out = merge_here(tmp_path, config, name=method, copy_tokenizer=False)
            _, report = architecture.model.from_pretrained(out, output_loading_info=True)
            assert architecture.not_loaded in report["missing_keys"]
            # the inputs themselves load, so it is the merge that loses them
            _, report = architecture.model.from_pretrained(subs[0], output_loading_info=True)
            assert not report["missing_keys"]
