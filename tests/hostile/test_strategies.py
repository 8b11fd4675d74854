"""Input that hypothesis makes, read by us and by who decides what it means: safetensors, PyYAML, transformers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from mergekit_select.errors import MergekitSelectError, UnreadableError
from mergekit_select.inputs.checkpoint import DTYPES, read_header
from mergekit_select.inputs.files import read_weight_map
from mergekit_select.inputs.recipe import read_recipes
from mergekit_select.planner.reading import Loader
from mergekit_select.verification.config import config_problems
from tests.support.models import small_family

alike = settings(derandomize=True, deadline=None, max_examples=100, database=None)

NAMES = st.text(min_size=1, max_size=12) | st.sampled_from(
    ["model.norm.weight", "__metadata__", "a/b", "../a", "\u202e"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "I128", "u8"]) | VALUES,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | VALUES,
    }
)


@alike
@given(st.dictionaries(NAMES, ENTRIES | VALUES, max_size=3), st.integers(0, 64))
def test_a_header_is_read_where_safetensors_reads_it(header: dict[str, Any], size: int) -> None:
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        try:
            with safe_open(file, framework="pt") as opened:
                wanted = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
                known = all(opened.get_slice(name).get_dtype() in DTYPES for name in wanted)
        except SafetensorError:
            known = False
        if known:
            assert {name: stored.shape for name, stored in read_header(file)[0].items()} == wanted
        else:
            with pytest.raises(UnreadableError):
                read_header(file)


TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name[0] != "_"),
    st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.bool]), st.lists(st.integers(0, 4))),
    min_size=1,
    max_size=4,
)


@alike
@given(TENSORS, st.randoms(use_true_random=False), st.booleans())
def test_tensors_are_read_from_where_safetensors_reads_them(tensors: Any, random_: Any, spaced: bool) -> None:
    """Whatever the order of a header's entries, their spelling and the spaces between them."""
    content = {name: torch.randint(0, 2, tuple(shape[:3])).to(dtype) for name, (dtype, shape) in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save_file(content, file)
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = [*json.loads(data[8 : 8 + length]).items()]
        random_.shuffle(entries)
        header = json.dumps(dict(entries), ensure_ascii=random_.random() < 0.5, indent=2 if spaced else None).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        own = LazyTensorLoader(ShardedTensorIndex.from_file(str(file)))
        loader = Loader("m", own)
        with safe_open(file, framework="pt") as opened:
            for name in content:
                found, wanted = loader.get_tensor(name), opened.get_tensor(name)
                assert found is not None
                assert found.dtype == wanted.dtype
                assert torch.equal(found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
                assert found.shape == wanted.shape
        loader.close()


@alike
@given(st.dictionaries(st.text(max_size=8), st.text(max_size=12) | VALUES, max_size=4))
def test_an_index_names_files_of_its_folder_or_is_refused(weight_map: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors.index.json")
        file.write_text(json.dumps({"weight_map": weight_map}))
        try:
            found = read_weight_map(file)
        except UnreadableError:
            return
        assert repr(found) == repr(json.loads(file.read_text())["weight_map"])
        for shard in found.values():
            assert (Path(folder) / shard).resolve().is_relative_to(Path(folder).resolve())


@alike
@given(st.dictionaries(st.sampled_from(["models", "slices", "merge_method", "parameters", "x"]), VALUES, max_size=4))
def test_a_recipe_says_what_pyyaml_says(recipe: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yml")
        file.write_bytes(yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "replace"))
        try:
            (found,) = read_recipes(file)
        except MergekitSelectError:
            return
        assert repr(found.raw) == repr(yaml.safe_load(file.read_bytes()))


@settings(alike, max_examples=60)
@given(st.data())
def test_a_config_without_problems_is_read_as_the_recipes(data: st.DataObject) -> None:
    base = small_family().base
    expected = AutoConfig.from_pretrained(base)
    content = json.loads((base / "config.json").read_text())
    key = data.draw(st.sampled_from([*content, "is_causal", "sliding_window", "rope_scaling", "torch_dtype"]))
    content[key] = data.draw(VALUES | st.sampled_from([*content.values()]))
    content["transformers_version"] = data.draw(st.sampled_from([content["transformers_version"], "4.57.0", "6.0.0"]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(content))
        try:
            problems = config_problems(file, expected, ())
        except MergekitSelectError:
            return
        if not problems:
            assert _decisive(AutoConfig.from_pretrained(folder)) == _decisive(expected)


def _decisive(config: Any) -> dict[str, Any]:
    ignored = ("use_cache", "_name_or_path", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if value is not None and key not in ignored}
