"""A folder that `merge` wrote equals, byte for byte, the one that stock mergekit-yaml writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods import TensorBatch, merge_method, register

from mergekit_select.errors import PlanError
from mergekit_select.execution import layout
from mergekit_select.execution.local import merge
from mergekit_select.execution.request import Request
from tests.support.checkpoints import copied, in_dtype, pickled, tensors_of

SMALL = 16_000  # bytes of a shard, which make several of the small Llamas


def both(tmp_path: Path, config: Mapping[str, Any], jobs: int = 1, **options: Any) -> tuple[Path, Path]:
    """Merge with stock mergekit and with the executor; return both folders, whose names are alike."""
    file = tmp_path / "recipe.yml"
    file.write_text("# kept verbatim\n" + yaml.safe_dump(dict(config), sort_keys=False))
    stock, ours = tmp_path / "stock" / "out", tmp_path / "ours" / "out"
    LoaderCache.loaders.clear()
    settings = MergeOptions(quiet=True, **options)
    run_merge(MergeConfiguration.model_validate(config), str(stock), settings, config_source=file.read_text())
    assert merge(Request(str(file), str(ours), options), jobs=jobs).finished
    return stock, ours


def assert_same(stock: Path, ours: Path) -> None:
    names = sorted(path.name for path in stock.iterdir())
    assert names == sorted(path.name for path in ours.iterdir() if path.name != ".merge")
    for name in names:
        left, right = (stock / name).read_bytes(), (ours / name).read_bytes()
        if name == "README.md":  # mergekit lists models in the order of a set
            left, right = (b"\n".join(sorted(text.split(b"\n"))) for text in (left, right))
        assert left == right, name


def listed(llamas: Any, method: str, **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(llamas.base),
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in llamas.subs],
        **changes,
    }


@pytest.mark.parametrize("size", [5_000_000_000, SMALL], ids=["whole", "sharded"])
@pytest.mark.parametrize("method", ["parameter_selection_resampling", "linear", "ties", "nuslerp"])
def test_methods(llamas: Any, tmp_path: Path, method: str, size: int) -> None:
    config = listed(llamas, method, dtype="bfloat16")
    config["models"] = config["models"][:2]  # nuslerp takes no more
    if method == "linear":
        del config["base_model"]  # then an arbitrary model gives the config, and they are all alike
    assert_same(*both(tmp_path, config, out_shard_size=size))


def test_several_parts_of_a_file(llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_PART", 5_000)
    stock, ours = both(tmp_path, listed(llamas, "parameter_selection"), out_shard_size=SMALL)
    assert_same(stock, ours)
    plan = json.loads((ours / ".merge" / "plan.json").read_text())
    assert len(plan["parts"]) > 2 * len(plan["files"]) > 4


@pytest.mark.parametrize("changes", [{"out_dtype": "float32"}, {"dtype": "float16"}, {"dtype": "float32"}], ids=str)
def test_dtypes(llamas: Any, tmp_path: Path, changes: dict[str, str]) -> None:
    assert_same(*both(tmp_path, listed(llamas, "parameter_selection", **changes), out_shard_size=SMALL))


def test_slices_that_repeat_a_layer(llamas: Any, tmp_path: Path) -> None:
    ranges = [(0, [0, 2]), (1, [1, 3]), (0, [1, 2]), (1, [1, 2])]
    slices = [{"sources": [{"model": str(llamas.subs[k]), "layer_range": layers}]} for k, layers in ranges]
    config = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": str(llamas.subs[0])}
    stock, ours = both(tmp_path, config, out_shard_size=SMALL)
    assert_same(stock, ours)
    assert len([name for name in tensors_of(ours) if "q_proj" in name]) == 6


def test_modules(llamas: Any, tmp_path: Path) -> None:
    config = listed(llamas, "parameter_selection")
    models = [{"model": model["model"]} for model in config.pop("models")]
    assert_same(*both(tmp_path, {**config, "modules": {"default": {"models": models}}}))


@pytest.mark.parametrize("tokenizer", [{"source": "base", "pad_to_multiple_of": 64}, {"source": "union"}], ids=str)
def test_aligned_vocabularies(llamas: Any, tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    assert_same(*both(tmp_path, listed(llamas, "parameter_selection", tokenizer=tokenizer), out_shard_size=SMALL))


def test_pickled_inputs(llamas: Any, tmp_path: Path) -> None:
    models = [{"model": str(pickled(model, tmp_path / f"{model.name}-pickled"))} for model in llamas.subs]
    config = {"merge_method": "parameter_selection", "base_model": str(llamas.base), "models": models}
    assert_same(*both(tmp_path, config))


def test_two_processes(llamas: Any, tmp_path: Path) -> None:
    assert_same(*both(tmp_path, listed(llamas, "parameter_selection"), jobs=2, out_shard_size=SMALL))


def test_adapters(llamas: Any, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(llamas.base), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(str(tmp_path / "adapter"))
    models = [{"model": f"{llamas.base}+{tmp_path / 'adapter'}"}, {"model": str(llamas.subs[0])}]
    config = {"merge_method": "parameter_selection", "base_model": str(llamas.base), "models": models}
    stock, ours = both(tmp_path, config, lora_merge_cache=str(tmp_path / "cache"))
    assert_same(stock, ours)


def test_mixed_dtypes_promote(llamas: Any, tmp_path: Path) -> None:
    half = copied(llamas.base, tmp_path / "half", in_dtype(torch.float16))
    models = [{"model": str(half)}, {"model": str(llamas.subs[0])}]
    stock, ours = both(
        tmp_path, {"merge_method": "slerp", "base_model": str(half), "models": models[1:], "parameters": {"t": 0.5}}
    )
    assert_same(stock, ours)
    assert {tensor.dtype for tensor in tensors_of(ours).values()} == {torch.float32}


@merge_method(name="test_last_model")  # type: ignore[untyped-decorator]  # mergekit does not annotate it
def last_model(batch: TensorBatch) -> torch.Tensor:
    """A method of somebody else's."""
    return batch.tensors[-1].clone()


def test_a_method_that_nobody_knows_is_merged_with_a_note(llamas: Any, tmp_path: Path) -> None:
    register(last_model)  # it stays registered: mergekit has no way back
    config = {"merge_method": "test_last_model", "models": [{"model": str(model)} for model in llamas.subs]}
    assert_same(*both(tmp_path, config))
    again = merge(Request(str(tmp_path / "recipe.yml"), str(tmp_path / "ours" / "out"), {}), jobs=1)
    assert again.notes == (
        "test_last_model is not known to give the same bits again: if it draws from a generator, use mergekit-yaml",
    )


def test_random_methods_are_refused(llamas: Any, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(listed(llamas, "dare_ties")))
    with pytest.raises(PlanError, match="dare_ties draws from a generator that all tensors share"):
        merge(Request(str(file), str(tmp_path / "out"), {}), jobs=1)
    assert not (tmp_path / "out").exists()
