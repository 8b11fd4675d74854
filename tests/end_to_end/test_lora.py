"""LoRA adapters, merged into their base by mergekit and then drawn among."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.compatibility import shows
from tests.support import expectation
from tests.support.adapters import train_adapters
from tests.support.commands import run
from tests.support.expectation import Stored
from tests.support.models import Family, assert_loads
from tests.support.recipes import METHODS, SELECTION, merge, recipe, written
from tests.support.stored import opened, wanted

both_methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def adapters(llamas: Family, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRA adapters of the base, as PEFT saves them."""
    return train_adapters(llamas.base, tmp_path_factory.mktemp("adapters"))


def merged_by_hand(base: dict[str, Stored], adapter: Path) -> dict[str, torch.Tensor]:
    """W + alpha/r * B A, in fp32."""
    lora = expectation.read_file(adapter / "adapter_model.safetensors")
    result = {name: opened(tensor).float() for name, tensor in base.items()}
    for name in lora:
        if match := re.fullmatch(r"base_model\.model\.(.*)\.lora_A\.weight", name):
            a, b = opened(lora[name]).float(), opened(lora[name.replace("lora_A", "lora_B")]).float()
            result[f"{match[1]}.weight"] += 4 / 2 * (b @ a)
    return result


@shows("LoRA", "sub-models given as `base+adapter`, with `--lora-merge-cache`")
@both_methods
def test_lora_adapters(llamas: Family, adapters: list[Path], tmp_path: Path, method: str) -> None:
    cache = tmp_path / "cache"
    config = recipe(method, llamas.base, [f"{llamas.base}+{adapter}" for adapter in adapters])
    out = merge(config, tmp_path / "out", lora_merge_cache=str(cache))
    base = expectation.read(llamas.base)
    merged = [expectation.read(next(cache.glob(f"*_{adapter.name}_*"))) for adapter in adapters]
    for adapter, tensors in zip(adapters, merged, strict=True):
        for name, by_hand in merged_by_hand(base, adapter).items():
            step = by_hand.abs().clamp(min=1e-3) * 2**-6  # a few bf16 steps: PEFT rounds twice
            assert ((opened(tensors[name]).float() - by_hand).abs() <= step).all(), name
    expectation.assert_same(expectation.read(out), wanted(method, base, merged))
    assert_loads(out)
    moved = expectation.read(out)["model.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(moved.bits, base["model.layers.0.self_attn.q_proj.weight"].bits)


@shows("LoRA", "adapters and whole models mixed")
@both_methods
def test_adapters_beside_whole_models(llamas: Family, adapters: list[Path], tmp_path: Path, method: str) -> None:
    config = recipe(method, llamas.base, [f"{llamas.base}+{adapters[0]}", llamas.subs[0]])
    out = merge(config, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
    merged = expectation.read(next((tmp_path / "cache").iterdir()))
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, [merged, llamas.subs[0]]))


@pytest.mark.parametrize("command", [("inspect",), ("merge", "--no-provenance")])
def test_quiet_commands_keep_transformers_quiet(
    llamas: Family, adapters: list[Path], tmp_path: Path, command: tuple[str, ...]
) -> None:
    """It draws a bar for each adapter's base that it loads, terminal or not."""
    config = recipe(SELECTION, llamas.base, [f"{llamas.base}+{adapter}" for adapter in adapters[:2]])
    out = [tmp_path / "out", "--jobs", 1] if command[0] == "merge" else []
    cache = ["--lora-merge-cache", tmp_path / "cache"]
    ran = run("mergekit-select", *command, written(tmp_path / "r.yml", config), *out, *cache, "--quiet")
    assert ran.returncode == 0, ran.stderr
    assert "%|" not in ran.stderr
    assert "[transformers]" not in ran.stderr
