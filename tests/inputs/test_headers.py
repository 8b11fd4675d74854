"""Safetensors files are read as safetensors reads them: what it refuses is refused, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from mergekit_select.findings import Finding, Report, Severity
from tests.check.cases import checked
from tests.support.checkpoints import Tensors, copied, tensors_of
from tests.support.models import Family
from tests.support.recipes import SELECTION, recipe

ENTRY = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}


def file_of(header: object, data: bytes = bytes(8)) -> bytes:
    """A safetensors file with such a header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def report_on(content: bytes, llamas: Family, folder: Path) -> tuple[Path, Report]:
    """A file with this content in the place of a sub-model's weights, and the report on the merge."""
    file = copied(llamas.subs[0], folder / "sub") / "model.safetensors"
    file.write_bytes(content)
    return file, checked(folder, recipe(SELECTION, llamas.base, [file.parent, llamas.subs[1]]))


def unreadable(report: Report) -> list[Finding]:
    """The findings about files that are not what they should be."""
    return [f for f in report.of(Severity.ERROR) if f.kind == "model-unreadable"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        (4).to_bytes(8, "little") + b"nope",
        (2).to_bytes(8, "little") + b"[]",
        (8).to_bytes(8, "little") + b'{"a":{}}',
        file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
        file_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        file_of({"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}),
        file_of({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        file_of({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 8]}}),
    ],
    ids=[
        "empty",
        "longer header than file",
        "no JSON",
        "no JSON object",
        "no tensor",
        "too few bytes for the shape",
        "a gap before the data",
        "truncated",
        "bytes of no tensor",
        "unknown dtype",
        "negative size",
        "a size that is no number",
    ],
)
def test_files_that_safetensors_refuses(content: bytes, llamas: Family, tmp_path: Path) -> None:
    file, report = report_on(content, llamas, tmp_path)
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    (finding,) = unreadable(report)
    assert str(file) in str(finding)
    assert not report.passes()


@pytest.mark.parametrize("metadata", [None, {}, {"a": "x"}, {"a": 1}, {"a": None}, [], "x"])
def test_metadata_is_accepted_as_safetensors_accepts_it(metadata: Any, llamas: Family, tmp_path: Path) -> None:
    file, report = report_on(file_of({"__metadata__": metadata, "a": ENTRY}), llamas, tmp_path)
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError:
        assert len(unreadable(report)) == 1
    else:
        assert not unreadable(report)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_shapes_are_those_of_the_tensors(dtype: torch.dtype, llamas: Family, tmp_path: Path) -> None:
    def cast(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    models = [copied(folder, tmp_path / folder.name, cast) for folder in llamas.everyone]
    (cost,) = checked(tmp_path, recipe(SELECTION, models[0], models[1:])).costs
    stored = sum(tensor.numel() * dtype.itemsize for tensor in tensors_of(models[0]).values())
    assert (cost.tensors, cost.bytes_written, cost.bytes_read) == (len(tensors_of(models[0])), stored, 4 * stored)
