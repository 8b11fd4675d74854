"""What these tests compare with can be trusted: it is the reference, reads files right, and notices one bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from tests.support import expectation
from tests.support.models import Family, write_llamas
from tests.support.stored import read_all, stored


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_expectation_in_numpy_is_the_reference(data: st.DataObject) -> None:
    count, models = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    columns = st.lists(st.integers(0, 2), min_size=count, max_size=count)
    subs, base = [data.draw(columns) for _ in range(models)], data.draw(st.none() | columns)
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=models, max_size=models).filter(any))
    options: dict[str, Any] = dict(
        weights=weights, seed=data.draw(st.integers(0, 2**63 - 1)), name=data.draw(st.sampled_from("abé"))
    )
    options |= dict(rounds=data.draw(st.none() | st.integers(1, 6)))
    wanted = reference.merge(subs, base, **options)[0]
    found = expectation.merge([np.array(sub) for sub in subs], None if base is None else np.array(base), **options)
    assert found.tolist() == wanted


def test_the_reader_reads_what_safetensors_writes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.tensor([[1.0, -0.0]]), "b": torch.tensor(2.0, dtype=torch.bfloat16), "c": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = expectation.read(tmp_path)
    assert {name: (t.dtype, t.shape, t.bits.tolist()) for name, t in found.items()} == {
        "a": ("F32", (1, 2), [0x3F800000, 0x80000000]),
        "b": ("BF16", (), [0x4000]),
        "c": ("F32", (0, 3), []),
    }


def test_one_differing_bit_is_noticed() -> None:
    """These tests can fail: one bit of one element is enough."""
    one = {"w": stored(torch.ones(4, dtype=torch.bfloat16))}
    other = {"w": stored(torch.tensor([1, 1, 1, 1.0078125], dtype=torch.bfloat16))}
    for check in (expectation.assert_same, lambda a, b: expectation.assert_taken_from(a, [b])):
        check(one, one)
        with pytest.raises(AssertionError):
            check(one, other)


def test_a_llama_and_its_family_differ_where_they_should(llamas: Family, tmp_path: Path) -> None:
    """The inputs are worth merging: sub-models share some of the base's bits, and some with each other."""
    base, *subs = read_all(*llamas.everyone)
    for sub in subs:
        same = np.concatenate([sub[name].bits == base[name].bits for name in base])
        assert 0.3 < same.mean() < 0.6
    again = write_llamas(tmp_path / "again")
    expectation.assert_same(expectation.read(again.subs[0]), subs[0])
