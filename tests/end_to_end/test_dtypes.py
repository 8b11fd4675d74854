"""Checkpoints in every floating dtype, and in several at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compatibility import shows
from tests.support import expectation
from tests.support.checkpoints import changed, copied, in_dtype
from tests.support.models import Family
from tests.support.recipes import METHODS, merge, recipe
from tests.support.stored import cast, read_all, wanted

both_methods = pytest.mark.parametrize("method", METHODS)


MIXED = [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def in_fp32(llamas: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The family in fp32, with bits below what the others hold."""
    family = llamas.copied(tmp_path_factory.mktemp("fp32") / "models")
    for folder in family.everyone:
        changed(folder, lambda tensors: tensors.update({name: t.float() * 1.0001 for name, t in tensors.items()}))
    return family


@shows("Checkpoints", lambda dtype: f"weights in {dtype}")
@both_methods
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(in_fp32: Family, tmp_path: Path, method: str, dtype: str) -> None:
    base, *subs = [copied(folder, tmp_path / folder.name, in_dtype(DTYPES[dtype])) for folder in in_fp32.everyone]
    out = merge(recipe(method, base, subs), tmp_path / "out")
    expectation.assert_same(expectation.read(out), wanted(method, base, subs))


@shows(
    "Checkpoints",
    lambda settings: (
        "fp32, fp16 and bf16 mixed, " + (" and ".join(f"`{k}: {v}`" for k, v in settings.items()) or "no `dtype`")
    ),
    note=lambda settings: (
        "`dtype` casts what is drawn from, `out_dtype` the result"
        if settings
        else "mergekit promotes tensor by tensor: the output is fp32"
    ),
)
@both_methods
@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "bfloat16"}, {"out_dtype": "float16"}, {"dtype": "float32", "out_dtype": "bfloat16"}],
    ids=str,
)
def test_mixed_dtypes(in_fp32: Family, tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    folders = [
        copied(folder, tmp_path / folder.name, in_dtype(dtype))
        for folder, dtype in zip(in_fp32.everyone, MIXED, strict=True)
    ]
    out = merge(recipe(method, folders[0], folders[1:], **settings), tmp_path / "out")
    drawn_in = getattr(torch, settings.get("dtype", "float32"))
    base_tensors, *tensors = [cast(t, drawn_in) for t in read_all(*folders)]
    result = wanted(method, base_tensors, tensors)
    if out_dtype := settings.get("out_dtype"):
        result = cast(result, getattr(torch, out_dtype))
    expectation.assert_same(expectation.read(out), result)
