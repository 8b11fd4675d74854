"""Tensors are mapped from their files one by one: the same bits, no file changed, and damage is an error."""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from safetensors.torch import save_file

from mergekit_select.errors import UnreadableError
from mergekit_select.planner.reading import Loader


def loader_of(file: Path) -> closing[Loader]:
    return closing(Loader("m", LazyTensorLoader(ShardedTensorIndex.from_file(str(file)))))


def got(loader: Loader, name: str) -> torch.Tensor:
    tensor = loader.get_tensor(name)
    assert tensor is not None
    return tensor


def test_a_method_that_writes_to_its_inputs_changes_no_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5000, dtype=torch.int32)}, file)
    before = file.read_bytes()
    with loader_of(file) as loader:
        got(loader, "a").zero_()
        assert file.read_bytes() == before
        assert torch.equal(got(loader, "a"), torch.arange(5000, dtype=torch.int32))


def test_a_tensor_outlives_its_loader(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5000)}, file)
    with loader_of(file) as loader:
        tensor = got(loader, "a")
    del loader
    assert torch.equal(tensor, torch.arange(5000))


@pytest.mark.parametrize("lead", range(9))
def test_wherever_the_data_begins(tmp_path: Path, lead: int) -> None:
    """A header may have any length: then elements lie at addresses that no processor likes."""
    file, values = tmp_path / "model.safetensors", torch.randn(3000, dtype=torch.float64)
    entries = {"a": {"dtype": "F64", "shape": [3000], "data_offsets": [0, values.nbytes]}}
    header = json.dumps(entries).encode() + b" " * lead
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    with loader_of(file) as loader:
        tensor = got(loader, "a")
    assert torch.equal(tensor, values)
    assert tensor.data_ptr() % 8 == 0


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(50_000), "b": torch.arange(50_000)}, file)
    with loader_of(file) as loader:
        os.truncate(file, file.stat().st_size - 8)
        assert torch.equal(got(loader, "a"), torch.arange(50_000))
        with pytest.raises(UnreadableError, match="ended while it was read; was it replaced during the merge"):
            loader.get_tensor("b")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux fills a mapping at once")
@pytest.mark.parametrize(("number", "fails"), [(errno.EFAULT, True), (errno.EINVAL, False)])
def test_a_disk_that_fails_and_a_linux_that_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(number, os.strerror(number))

    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(50_000)}, file)
    monkeypatch.setattr(mmap, "mmap", Mapping)
    with loader_of(file) as loader:
        if fails:
            with pytest.raises(UnreadableError, match=r"cannot read .*model\.safetensors: Bad address"):
                loader.get_tensor("a")
        else:
            assert torch.equal(got(loader, "a"), torch.arange(50_000))
