"""``verify`` says in one line which file is not what it should be."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mergekit_select.errors import MergekitSelectError
from mergekit_select.verification import verify
from tests.support.checkpoints import save, tensors_of
from tests.support.commands import invoke
from tests.support.models import small_family
from tests.support.recipes import RESAMPLING, merge
from tests.verification.support import refused


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"\x00\xff\xfe\x80", "must be UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n", "must be UTF-8 text"),
        (b"a: [", "must be YAML"),
        (b"- 1\n- 2\n", "must be a YAML mapping"),
        (b"just words", "must be a YAML mapping"),
        (b"merge_method: linear\n", "Exactly one of"),
        (b"merge_method: linear\nmodels: 3\n", "models: must be a list"),
        (b"[" * 1500, "at most 50 levels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recipe(out: Path, content: bytes, text: str) -> None:
    (out / "mergekit_config.yml").write_bytes(content)
    refused(invoke("verify", out), text)


def test_unknown_method(out: Path) -> None:
    path = out / "mergekit_config.yml"
    path.write_text(path.read_text().replace(RESAMPLING, "no_such_method"))
    refused(invoke("verify", out), "Unimplemented merge method no_such_method")
    with pytest.raises(MergekitSelectError):
        verify(out)


def test_parameter_that_breaks_its_rule(out: Path) -> None:
    path = out / "mergekit_config.yml"
    path.write_text(path.read_text() + "parameters: {seed: -1}\n")
    refused(invoke("verify", out), "seed must be an integer in [0, 2^63)")


def test_no_folder(tmp_path: Path) -> None:
    refused(invoke("verify", tmp_path / "none"), "cannot read the output folder")
    (tmp_path / "file").write_text("x")
    refused(invoke("verify", tmp_path / "file"), "Not a directory")
    (tmp_path / "empty").mkdir()
    refused(invoke("verify", tmp_path / "empty"), "holds nothing that a merge writes")


def test_recipe_that_is_missing_or_a_folder(out: Path, tmp_path: Path) -> None:
    refused(invoke("verify", out, "--recipe", tmp_path / "none.yml"), "No such file")
    refused(invoke("verify", out, "--recipe", tmp_path), "Is a directory")


@pytest.mark.parametrize("file", ["model.safetensors", "mergekit_config.yml", "config.json", "."])
def test_no_permission(out: Path, file: str) -> None:
    mode = (out / file).stat().st_mode
    (out / file).chmod(0)
    try:
        if os.access(out / file, os.R_OK):
            pytest.skip("root may read everything")
        refused(invoke("verify", out), "Permission denied")
    finally:
        (out / file).chmod(mode)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights(out: Path, keep: int) -> None:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(invoke("verify", out), "model.safetensors is no whole safetensors file")


def test_header_that_lies_about_sizes(out: Path) -> None:
    path = out / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    refused(invoke("verify", out), "is no whole safetensors file")
    path.write_bytes(content.replace(b'"shape":[32]', b'"shape":[99]'))
    refused(invoke("verify", out), "is no whole safetensors file")


def test_damaged_pickle(tmp_path: Path) -> None:
    recipe = small_family().recipe()
    out = merge(recipe, tmp_path / "out", safe_serialization=False)
    (out / "pytorch_model.bin").write_bytes(b"no pickle")
    refused(invoke("verify", out), "cannot read")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_damaged_json(shards: Path, content: bytes) -> None:
    index = shards / "model.safetensors.index.json"
    before = index.read_bytes()
    index.write_bytes(content)
    refused(invoke("verify", shards), "model.safetensors.index.json")
    index.write_bytes(before)
    (shards / "config.json").write_bytes(content)
    refused(invoke("verify", shards), "config.json")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}], ids=str)
def test_index_of_another_shape(shards: Path, index: dict[str, Any]) -> None:
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(invoke("verify", shards), "must map tensor names to files")


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    out = merge(family.recipe(), tmp_path / "out")
    weights = family.subs[0] / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-7])
    refused(invoke("verify", out), str(weights))
    weights.unlink()
    refused(invoke("verify", out), str(family.subs[0]))
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (family.subs[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(invoke("verify", out), "gone.safetensors")
    shutil.rmtree(family.subs[0])
    refused(invoke("verify", out), "there is no folder")


def test_model_that_lacks_a_tensor(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    out = merge(family.recipe(), tmp_path / "out")
    tensors = tensors_of(family.subs[1])
    del tensors["model.norm.weight"]
    save(family.subs[1], tensors)
    refused(invoke("verify", out), "tensor 'model.norm.weight'")


def test_nothing_is_modified(out: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    invoke("verify", out, "--json")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
