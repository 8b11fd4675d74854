"""``check`` on LoRA adapters and on the cache that mergekit merges them in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mergekit_select.findings import Severity
from tests.check.cases import Case, Cases, checked, kinds, only
from tests.support.adapters import cached_merge, write_adapter
from tests.support.checkpoints import (
    copied,
    edit_json,
)
from tests.support.models import Family
from tests.support.recipes import SELECTION, merge, recipe

CASES = Cases()


def lora_case(llamas: Family, tmp: Path, adapter: Path) -> Case:
    """A recipe with the adapter, and a cache to merge it in."""
    config = recipe(SELECTION, llamas.base, [f"{llamas.base}+{adapter}", llamas.subs[1]])
    return Case(config, options={"lora_merge_cache": str(tmp / "cache")})


def described(folder: Path) -> Path:
    """An adapter of which there is no more than a configuration without content."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


@CASES.add("lora-cache")
def lora_without_a_cache(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(SELECTION, llamas.base, [f"{llamas.base}+{described(tmp / 'adapter')}"]))


@CASES.add("model-missing")
def lora_without_weights(llamas: Family, tmp: Path) -> Case:
    adapter = write_adapter(tmp / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    return lora_case(llamas, tmp, adapter)


@CASES.add("model-unreadable")
def lora_config_that_is_no_json(llamas: Family, tmp: Path) -> Case:
    adapter = write_adapter(tmp / "adapter")
    (adapter / "adapter_config.json").write_text("{")
    return lora_case(llamas, tmp, adapter)


@CASES.add("lora-invalid")
def lora_config_without_a_type(llamas: Family, tmp: Path) -> Case:
    adapter = write_adapter(tmp / "adapter")
    (adapter / "adapter_config.json").write_text('{"r": 2}')
    return lora_case(llamas, tmp, adapter)


@CASES.add("lora-invalid")
def lora_of_another_width(llamas: Family, tmp: Path) -> Case:
    return lora_case(llamas, tmp, write_adapter(tmp / "adapter", rows=56))


@CASES.add("lora-invalid")
def lora_of_another_rank(llamas: Family, tmp: Path) -> Case:
    return lora_case(llamas, tmp, write_adapter(tmp / "adapter", r=5))


@CASES.add("lora-cache-stale")
def lora_cache_left_unfinished(llamas: Family, tmp: Path) -> Case:
    adapter = described(tmp / "adapter")
    cached_merge(tmp / "cache", f"{llamas.base}+{adapter}").mkdir(parents=True)
    return lora_case(llamas, tmp, adapter)


def test_a_lora_cache_older_than_its_adapter(llamas: Family, tmp_path: Path) -> None:
    name = f"{llamas.base}+{described(tmp_path / 'adapter')}"
    merged = copied(llamas.subs[0], cached_merge(tmp_path / "cache", name))
    for file in merged.iterdir():
        os.utime(file, (1, 1))
    config = recipe(SELECTION, llamas.base, [name, llamas.subs[1]])
    report = checked(tmp_path, config, lora_merge_cache=str(tmp_path / "cache"))
    assert only(report, "lora-cache-stale").severity is Severity.WARNING
    assert report.passes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [{}, {"r": 3, "rank_pattern": {"up_proj": 2}}, {"r": 7, "rank_pattern": {"layers.0.mlp.up_proj": 2}}],
)
def test_a_lora_that_fits(llamas: Family, tmp_path: Path, settings: dict[str, Any]) -> None:
    name = f"{llamas.base}+{write_adapter(tmp_path / 'adapter', **settings)}"
    config = recipe(SELECTION, llamas.base, [name, llamas.subs[1]])
    report = checked(tmp_path, config, lora_merge_cache=str(tmp_path / "cache"))
    assert not report.of(Severity.ERROR), [str(f) for f in report.findings]
    assert "not-known" not in kinds(report)
    merge(config, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))


def test_what_a_lora_does_cannot_always_be_known(llamas: Family, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", layer="elsewhere")
    config = recipe(SELECTION, llamas.base, [f"{llamas.base}+{adapter}", llamas.subs[1]])
    changes: list[dict[str, Any]] = [{}, {"peft_type": "IA3"}, {"use_qalora": True}]
    for change in changes:
        edit_json(adapter / "adapter_config.json", **change)
        report = checked(tmp_path, config, lora_merge_cache=str(tmp_path / "cache"))
        assert report.passes(), [str(f) for f in report.findings]
        assert "not-known" in kinds(report)
