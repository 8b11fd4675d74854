"""The two methods under mergekit: what they merge to, what they refuse, and in which words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.merge_methods import TensorGroup, get, merge_state_dicts, merge_tensors

import mergekit_select.methods
from mergekit_select.bits import flat_integers
from mergekit_select.errors import ParameterError, TensorError
from tests import reference
from tests.support.checkpoints import Change, copied, digests, finished, tensors_of, without
from tests.support.commands import run
from tests.support.models import Family, write_llamas
from tests.support.recipes import METHODS, RESAMPLING, SELECTION, Recipe, merge, recipe, written


def bits(tensor: torch.Tensor) -> list[int]:
    found: list[int] = flat_integers(tensor).tolist()
    return found


def expected(base: Path | None, subs: list[Path], **options: Any) -> dict[str, list[int]]:
    """Every output tensor of a merge as the reference makes it."""
    base_tensors = tensors_of(base) if base else None
    models = [tensors_of(sub) for sub in subs]
    return {
        name: reference.merge(
            [bits(model[name]) for model in models],
            bits(base_tensors[name]) if base_tensors else None,
            name=name,
            **options,
        )[0]
        for name in models[0]
    }


def merged_bits(folder: Path) -> dict[str, list[int]]:
    return {name: bits(tensor) for name, tensor in tensors_of(folder).items()}


def test_the_methods_say_who_they_are() -> None:
    for name, pretty in zip(METHODS, ["Parameter Selection", "Parameter Selection with Resampling"], strict=True):
        spec = get(name).spec
        assert (spec.pretty_name, spec.reference_url) == (pretty, "https://arxiv.org/abs/2410.03743")
        assert get(name) is getattr(mergekit_select.methods, name)


def test_selection_through_mergekit_yaml_is_the_reference(llamas: Family, tmp_path: Path) -> None:
    config = recipe(
        SELECTION, llamas.base, llamas.subs, parameters={"seed": 5, "draws": 1}, model_parameters=weights(1, 2, 1)
    )
    out = merge(config, tmp_path / "out", new_process=True)
    assert merged_bits(out) == expected(None, llamas.subs, seed=5, weights=[1, 2, 1])
    card = (out / "README.md").read_text()
    assert "using the [Parameter Selection](https://arxiv.org/abs/2410.03743) merge method" in card


@pytest.mark.parametrize("rounds", [None, 1])
def test_resampling_through_mergekit_is_the_reference(llamas: Family, tmp_path: Path, rounds: int | None) -> None:
    parameters = {"seed": 6} | ({"rounds": rounds} if rounds else {})
    out = merge(llamas.recipe(RESAMPLING, parameters=parameters), tmp_path / "out")
    assert merged_bits(out) == expected(llamas.base, llamas.subs, seed=6, rounds=rounds)


def test_the_base_is_a_candidate_only_where_it_is_listed_and_there_is_no_base_model(
    llamas: Family, tmp_path: Path
) -> None:
    listed = merge(recipe(SELECTION, None, llamas.everyone), tmp_path / "listed")
    assert merged_bits(listed) == expected(None, llamas.everyone)
    both = merge(recipe(SELECTION, llamas.base, llamas.everyone), tmp_path / "both")
    assert merged_bits(both) == expected(None, llamas.subs)


def weights(*values: float) -> list[dict[str, float]]:
    return [{"weight": value} for value in values]


def test_weights_may_be_text_filters_and_gradients(llamas: Family, tmp_path: Path) -> None:
    config = recipe(
        SELECTION,
        llamas.base,
        llamas.subs,
        model_parameters=[
            {"weight": "1e0"},
            {"weight": [{"filter": "self_attn", "value": 0}, {"value": 1}]},
            {"weight": [1, 0]},
        ],
    )
    out = merged_bits(merge(config, tmp_path / "out"))
    for name, found in out.items():
        layer = re.search(r"layers\.(\d)", name)
        # mergekit takes tensors before and after the layers for the beginning of a gradient
        gradient = 1 - int(layer[1]) / 2 if layer else 1.0
        chosen = [1.0, 0.0 if "self_attn" in name else 1.0, gradient]
        assert found == expected_tensor(llamas.subs, name, weights=chosen)


def expected_tensor(subs: list[Path], name: str, **options: Any) -> list[int]:
    return reference.merge([bits(tensors_of(sub)[name]) for sub in subs], name=name, **options)[0]


def test_merging_tensors_one_by_one_in_another_order_or_a_subset_gives_the_same_bits(
    llamas: Family, tmp_path: Path
) -> None:
    out = tensors_of(merge(llamas.recipe(RESAMPLING), tmp_path / "out"))
    models = [tensors_of(folder) for folder in llamas.everyone]
    for name in sorted(out, reverse=True)[::2]:
        alone = merge_tensors([m[name] for m in models], RESAMPLING, base_index=0, name=name)
        assert torch.equal(alone.view(torch.int16), out[name].view(torch.int16))
    some = sorted(out)[3:7]
    dictionaries: dict[Any, Any] = {k: {name: m[name] for name in some} for k, m in enumerate(models)}
    for name, tensor in merge_state_dicts(dictionaries, RESAMPLING, base=0).items():
        assert torch.equal(tensor.view(torch.int16), out[name].view(torch.int16))


def test_tied_embeddings_in_memory_as_on_disk(tmp_path: Path) -> None:
    """In memory they have two names, and are drawn once all the same."""
    family = write_llamas(tmp_path / "models", tied=True)
    out = merge(family.recipe(RESAMPLING), tmp_path / "out")
    modules = [transformers.LlamaForCausalLM.from_pretrained(folder) for folder in family.everyone]
    merged = merge_state_dicts(modules, RESAMPLING, base=0)
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    modules[0].load_state_dict(merged)
    assert modules[0].lm_head.weight is modules[0].model.embed_tokens.weight
    modules[0].save_pretrained(tmp_path / "saved")
    assert digests(tmp_path / "saved") == digests(out)


def test_tensors_that_are_tied_in_one_model_alone_are_two_in_memory_as_on_disk() -> None:
    generator = torch.Generator().manual_seed(0)
    tied, one, other = torch.rand(3, 512, generator=generator).unbind()
    merged = merge_state_dicts([{"a": tied, "b": tied}, {"a": one, "b": other}], SELECTION)
    for name, second in (("a", one), ("b", other)):
        assert torch.equal(merged[name], merge_tensors([tied, second], SELECTION, name=name))


def test_a_view_of_another_tensor_is_not_tied_to_it() -> None:
    tensors = [torch.arange(16.0).reshape(4, 4) + 100 * k for k in range(3)]
    models = [{"w": tensor, "transposed": tensor.T, "part": tensor[:2]} for tensor in tensors]
    for name, merged in merge_state_dicts(models, SELECTION).items():
        assert torch.equal(merged, merge_tensors([model[name] for model in models], SELECTION, name=name))


def test_a_tensor_without_a_name_has_the_draws_of_the_empty_name() -> None:
    tensors = [torch.full((64,), float(k)) for k in range(3)]
    merged = merge_tensors(tensors, SELECTION, parameters={"seed": 4})
    assert merged.tolist() == [float(k) for k in reference.merge([[k] * 64 for k in range(3)], seed=4)[2]]


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_the_documentation(method: str) -> None:
    """Seed 0; a weight is given to all sub-models or to none."""
    tensors, base = [torch.full((4096,), float(k)) for k in range(3)], None if method == SELECTION else 0
    merged = merge_tensors(tensors, method, base_index=base)
    assert torch.equal(merged, merge_tensors(tensors, method, base_index=base, parameters={"seed": 0}))
    assert not torch.equal(merged, merge_tensors(tensors, method, base_index=base, parameters={"seed": 1}))


def test_one_sub_model_is_enough_and_none_is_refused() -> None:
    one, base = torch.ones(8), torch.zeros(8)
    for method in METHODS:
        assert torch.equal(merge_tensors([base, one], method, base_index=0), one)
        with pytest.raises(ValueError, match="non-base"):
            merge_tensors([base], method, base_index=0)


def test_results_carry_no_autograd_history() -> None:
    models = [torch.nn.Linear(4, 4) for _ in range(3)]
    for method, base in zip(METHODS, (None, 0), strict=True):
        for tensor in merge_state_dicts(models, method, base=base).values():
            assert not tensor.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_an_integer_tensor_is_a_type_error(method: str, dtype: torch.dtype) -> None:
    tensors = [torch.ones(3, dtype=dtype)] * 3
    with pytest.raises(TypeError) as raised:
        merge_tensors(tensors, method, base_index=0, name="steps", ids=["a", "b", "c"])
    assert str(raised.value) == (
        f"tensor 'steps', models b, c: selection copies floating-point tensors of 8, 16, 32 or 64 bits, got {dtype}; "
        f"copy such a tensor from one model instead"
    )
    assert isinstance(raised.value, TensorError)


NUMBER = "weight must be a finite number of at least 0, got {}; give a number of at least 0, such as weight: 1"
SEED = "seed must be an integer in [0, 2^63), such as seed: 0, got {}"
ROUNDS = "rounds must be an integer of at least 1, or left out to redraw until the value differs, got {}"
HINT = " (mergekit makes such a number of a list)"
DRAWS = (
    "draws must be 1, the only version of the draws that this mergekit-select knows; upgrade it for a later one, got {}"
)


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("weight", -0.5, NUMBER.format("-0.5")),
        ("weight", float("nan"), NUMBER.format("nan")),
        ("weight", float("inf"), NUMBER.format("inf")),
        ("weight", "-inf", NUMBER.format("'-inf'")),
        ("weight", "much", NUMBER.format("'much'")),
        ("weight", True, NUMBER.format("True")),
        ("weight", [1, -1], NUMBER.format("-1")),
        ("weight", {"filter": "mlp", "value": -2}, NUMBER.format("-2")),
        ("seed", -1, SEED.format("-1")),
        ("seed", 2**63, SEED.format(2**63)),
        ("seed", 1.5, SEED.format(f"1.5{HINT}")),
        ("seed", 2.0, SEED.format(f"2.0{HINT}")),
        ("seed", "7", SEED.format("'7'")),
        ("seed", True, SEED.format("True")),
        ("seed", [2, 2], SEED.format(f"2.0{HINT}")),
        ("seed", [1, 2, 3], SEED.format(f"1.0{HINT}")),
        ("seed", [7], SEED.format(f"7.0{HINT}")),
        ("rounds", 0, ROUNDS.format("0")),
        ("rounds", -1, ROUNDS.format("-1")),
        ("rounds", 1.5, ROUNDS.format(f"1.5{HINT}")),
        ("rounds", "1", ROUNDS.format("'1'")),
        ("rounds", [1, 1], ROUNDS.format(f"1.0{HINT}")),
        ("draws", 2, DRAWS.format("2")),
        ("draws", "1", DRAWS.format("'1'")),
        ("draws", [1, 1], DRAWS.format(f"1.0{HINT}")),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_written(
    llamas: Family, tmp_path: Path, parameter: str, value: Any, message: str
) -> None:
    config = llamas.recipe(RESAMPLING, parameters={parameter: value})
    with pytest.raises(ParameterError) as raised:
        merge(config, tmp_path / "out")
    assert str(raised.value) == message
    assert not (tmp_path / "out").exists()
    if not isinstance(value, (list, dict)):
        with pytest.raises(ParameterError) as raised:
            merge_tensors([torch.ones(2)] * 3, RESAMPLING, base_index=0, parameters={parameter: value})
        assert str(raised.value) == message


def test_a_list_is_refused_where_there_are_no_layers(llamas: Family, tmp_path: Path) -> None:
    files = [folder / "model.safetensors" for folder in llamas.everyone]
    config = recipe(SELECTION, files[0], files[1:], parameters={"seed": [2, 2]})
    done = run("mergekit-pytorch", written(tmp_path / "raw.yml", config), tmp_path / "out")
    assert done.stderr.splitlines()[-1] == (
        "mergekit_select.errors.ParameterError: seed must be one integer for the whole merge, got a list (mergekit "
        "would interpolate it); write seed: 2"
    )
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_the_message(llamas: Family, tmp_path: Path) -> None:
    file = written(tmp_path / "recipe.yml", llamas.recipe(SELECTION, parameters={"draws": 2}))
    done = run("mergekit-yaml", file, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"mergekit_select.errors.ParameterError: {DRAWS.format('2')}"
    assert not finished(tmp_path / "out")


ALL_ZERO = "the weights of the {} sub-models that have the tensor are all 0; make one of them positive"


@pytest.mark.parametrize(
    ("parameters", "tensor"),
    [
        (weights(0, 0, 0), "lm_head.weight"),
        ([{"weight": [{"filter": "mlp.up_proj", "value": 0}, {"value": 1}]}] * 3, "model.layers.0.mlp.up_proj.weight"),
        ([{"weight": [1, 0]}] * 3, "model.layers.2.input_layernorm.weight"),
    ],
)
@pytest.mark.parametrize("shard_size", [5_000_000_000, 2000])
def test_weights_that_sum_to_0_name_the_tensor_and_leave_nothing_finished(
    llamas: Family, tmp_path: Path, parameters: list[Recipe], tensor: str, shard_size: int
) -> None:
    config = llamas.recipe(SELECTION, model_parameters=parameters)
    with pytest.raises(ParameterError) as raised:
        merge(config, tmp_path / "out", out_shard_size=shard_size)
    models = ", ".join(str(sub) for sub in llamas.subs)
    assert str(raised.value) == f"tensor {tensor!r}, models {models}: {ALL_ZERO.format(3)}"
    assert not finished(tmp_path / "out")


def test_mergekits_own_messages(llamas: Family, tmp_path: Path) -> None:
    """Texts are mergekit's; they are pinned since users of these methods meet them."""
    no_base = recipe(RESAMPLING, None, llamas.subs)
    with pytest.raises(ValueError, match=r"^Merge method requires a base input for default\.slices\[0\]$"):
        merge(no_base, tmp_path / "out")
    base_alone = recipe(RESAMPLING, llamas.base, [llamas.base])
    message = r"^Merge method requires at least 1 non-base inputs for default\.slices\[0\]; got 0$"
    with pytest.raises(ValueError, match=message):
        merge(base_alone, tmp_path / "out")
    assert not finished(tmp_path / "out")


def test_a_tensor_of_another_shape_or_missing_is_refused(llamas: Family, tmp_path: Path) -> None:
    shorter: Change = lambda t: t.update({"model.norm.weight": torch.ones(31, dtype=torch.bfloat16)})  # noqa: E731
    for number, (change, message) in enumerate(
        [
            (shorter, "Tensor size mismatch for"),
            (without("model.norm.weight"), "Tensor model.norm.weight required but not present in model"),
        ]
    ):
        broken = copied(llamas.subs[0], tmp_path / f"broken-{number}", change)
        with pytest.raises((ValueError, RuntimeError), match=message):
            merge(recipe(SELECTION, llamas.base, [broken, *llamas.subs[1:]]), tmp_path / "out")
        assert not finished(tmp_path / "out")


def test_optional_tensors(llamas: Family) -> None:
    """A tensor that only some inputs have: the only holder is copied, several are drawn among."""
    method: Any = get(SELECTION)
    group = TensorGroup.from_tensors([torch.full((40,), float(k)) for k in range(2)], ids=["b", "c"], name="t")
    (merged,) = method((group,), parameters={"weight": {"b": 1, "c": 3}})
    assert set(merged.tolist()) == {0.0, 1.0}
    assert merged.tolist() == [float(k) for k in reference.merge([[0] * 40, [1] * 40], weights=[1, 3], name="t")[2]]
