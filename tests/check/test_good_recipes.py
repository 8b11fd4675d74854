"""``check`` on recipes without a mistake: no error, and the cost that the merge has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors

from mergekit_select.findings import Severity
from tests.check.cases import checked
from tests.support.checkpoints import (
    tensors_of,
)
from tests.support.models import Family
from tests.support.recipes import RESAMPLING, SELECTION, Recipe, merge, recipe

GOOD: dict[str, Callable[[Family], Recipe]] = {
    "selection": lambda m: recipe(SELECTION, m.base, m.subs),
    "selection without a base": lambda m: recipe(SELECTION, None, m.subs),
    "resampling": lambda m: recipe(RESAMPLING, m.base, m.subs, parameters={"rounds": 1, "seed": 3, "draws": 1}),
    "a gradient": lambda m: recipe(SELECTION, m.base, m.subs, model_parameters=[{"weight": [0, 1]}, {}, {}]),
    "linear": lambda m: recipe("linear", None, m.subs, parameters={"weight": 1.0}, dtype="float16"),
    "slerp": lambda m: recipe(
        "slerp",
        m.base,
        [m.base, m.subs[0]],
        parameters={
            "t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 1}]
        },
        dtype="bfloat16",
    ),
    "task_arithmetic": lambda m: recipe("task_arithmetic", m.base, m.subs, parameters={"weight": 0.3, "lambda": 0.5}),
    "ties": lambda m: recipe(
        "ties", m.base, m.subs, parameters={"weight": 0.5, "density": 0.5, "normalize": True, "int8_mask": True}
    ),
    "dare_ties": lambda m: recipe("dare_ties", m.base, m.subs, parameters={"weight": 0.5, "density": 0.5}),
    "dare_linear": lambda m: recipe("dare_linear", m.base, m.subs, parameters={"weight": 0.5, "density": 0.5}),
    "breadcrumbs": lambda m: recipe("breadcrumbs", m.base, m.subs, parameters={"weight": 0.5, "density": 0.9}),
    "breadcrumbs_ties": lambda m: recipe("breadcrumbs_ties", m.base, m.subs, parameters={"weight": 0.5, "gamma": 0.01}),
    "della": lambda m: recipe("della", m.base, m.subs, parameters={"weight": 0.5, "density": 0.5, "epsilon": 0.1}),
    "della_linear": lambda m: recipe(
        "della_linear", m.base, m.subs, parameters={"weight": 0.5, "density": 0.5, "epsilon": 0.1}
    ),
    "model_stock": lambda m: recipe("model_stock", m.base, m.subs),
    "nuslerp": lambda m: recipe("nuslerp", None, m.subs[:2], parameters={"weight": 0.5}),
    "multislerp": lambda m: recipe("multislerp", None, m.subs, parameters={"weight": 1}),
    "karcher": lambda m: recipe("karcher", None, m.subs),
    "sce": lambda m: recipe("sce", m.base, m.subs, parameters={"select_topk": 0.5}),
    "nearswap": lambda m: recipe("nearswap", m.base, m.subs[:1], parameters={"t": 0.001}),
    "arcee_fusion": lambda m: recipe("arcee_fusion", m.base, m.subs[:1]),
    "ram": lambda m: recipe("ram", m.base, m.subs),
    "ramplus_tl": lambda m: recipe("ramplus_tl", m.base, m.subs),
    "frankenmerge": lambda m: {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(m.subs[0]), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(m.subs[1]), "layer_range": [1, 3]}]},
            {"sources": [{"model": str(m.subs[0]), "layer_range": [1, 3]}]},
        ],
        "dtype": "bfloat16",
    },
    "slices": lambda m: {
        "merge_method": SELECTION,
        "base_model": str(m.base),
        "slices": [
            {"sources": [{"model": str(sub), "layer_range": [0, 2]} for sub in (m.base, *m.subs)]},
            {"sources": [{"model": str(sub), "layer_range": [2, 3]} for sub in (m.base, *m.subs)]},
        ],
    },
    "modules": lambda m: {
        "merge_method": "linear",
        "modules": {"default": {"models": [{"model": str(sub), "parameters": {"weight": 1}} for sub in m.subs]}},
    },
    "aligned tokenizers": lambda m: recipe(
        SELECTION, m.base, m.subs, tokenizer={"source": "base", "pad_to_multiple_of": 64}, chat_template="chatml"
    ),
    "a union of tokenizers": lambda m: recipe(SELECTION, m.base, m.subs, tokenizer_source="union"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GOOD)
def test_a_good_recipe_has_no_errors_and_merges(name: str, llamas: Family, tmp_path: Path) -> None:
    config = GOOD[name](llamas)
    report = checked(tmp_path, config, tmp_path / "out")
    assert not report.of(Severity.ERROR), [str(f) for f in report.findings]
    written = tensors_of(merge(config, tmp_path / "out"))
    (cost,) = report.costs
    assert cost.tensors == len(written)
    assert cost.bytes_written == sum(tensor.numel() * tensor.element_size() for tensor in written.values())


def test_every_registered_method_has_a_good_recipe(llamas: Family) -> None:
    from mergekit.merge_methods import registered_methods

    import mergekit_select.methods  # noqa: F401

    used = {make(llamas)["merge_method"] for make in GOOD.values()}
    # Tests of plugins leave methods of their own in the registry.
    assert used >= {
        method.spec.name
        for method in registered_methods()
        if type(method).__module__.startswith("mergekit.")
        and getattr(method, "implementation", type(method)).__module__.startswith(("mergekit.", "mergekit_select."))
    }


def test_a_recipe_without_anything_wrong_gives_nothing_but_its_cost(llamas: Family, tmp_path: Path) -> None:
    report = checked(tmp_path, recipe(SELECTION, llamas.base, llamas.subs), tmp_path / "out")
    assert report.findings == ()
    (cost,) = report.costs
    stored = sum(tensor.numel() * 2 for tensor in tensors_of(llamas.base).values())
    assert (cost.bytes_written, cost.bytes_read) == (stored, 4 * stored)
    assert cost.peak_tensor in ("model.embed_tokens.weight", "lm_head.weight")
    largest = 96 * 32 * 2
    assert cost.peak_memory == stored + 5 * largest + (64 << 20)


class HeadersOnly:
    """A safetensors file that may be asked for anything but a tensor."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._file = SAFE_OPEN(*arguments, **options)

    def __enter__(self) -> HeadersOnly:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name == "get_tensor":
            raise AssertionError("a tensor was read")
        return getattr(self._file, name)


SAFE_OPEN: Any = safetensors.safe_open


def test_no_tensor_is_read(llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(("mergekit", "safetensors")) and getattr(module, "safe_open", None) is SAFE_OPEN:
            monkeypatch.setattr(module, "safe_open", HeadersOnly)
    assert checked(tmp_path, recipe(RESAMPLING, llamas.base, llamas.subs)).passes()
    with pytest.raises(AssertionError, match="a tensor was read"):  # so the test can fail
        merge(recipe(RESAMPLING, llamas.base, llamas.subs), tmp_path / "out")
