"""``check``: every kind of error makes a merge fail or go silently wrong, and good recipes give none."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import save_file

from checkpoints import digests, merge_here, recipe, tensors_of
from mergekit_select.findings import KINDS, Severity

SELECT = "parameter_selection"
RESAMPLE = "parameter_selection_resampling"


def checked(tmp_path: Path, config: Any, out: Path | str | None = None, **options):
    from mergekit.options import MergeOptions

    from mergekit_select.check import check

    file = tmp_path / "recipe.yml"
    documents = config if isinstance(config, list) else [config]
    file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return check(file, out, MergeOptions(**options))


def kinds(report, severity=None) -> list[str]:
    return [f.kind for f in report.findings if severity is None or f.severity is severity]


def variant(source: Path, folder: Path, config: dict | None = None, tensors: Callable | None = None) -> Path:
    """Copy a checkpoint with another config, or tensors changed in place."""
    shutil.copytree(source, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.update(config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    if tensors is not None:
        held = tensors_of(folder)
        tensors(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Case(NamedTuple):
    """A recipe with one error, and what the merge does: it raises, or ``wrong`` holds for its output."""

    kind: str
    config: dict
    wrong: Callable[[Path], bool] | None = None
    options: dict | None = None


CASES: dict[str, Callable[[Any, Path], Case]] = {}


def case(function):
    CASES[function.__name__] = function
    return function


def not_finite(out: Path) -> bool:
    return any(not torch.isfinite(tensor.float()).all() for tensor in tensors_of(out).values())


@case
def both_models_and_slices(llamas, tmp):
    config = recipe(SELECT, llamas.base, llamas.subs)
    slices = [{"sources": [{"model": str(llamas.base), "layer_range": [0, 3]}]}]
    return Case("recipe-invalid", {**config, "slices": slices})


@case
def no_models(llamas, tmp):
    return Case("recipe-invalid", {"merge_method": "linear"})


@case
def misspelt_parameter(llamas, tmp):
    good = recipe(SELECT, llamas.base, llamas.subs)
    merge_here(tmp, good, "plain")
    config = {**good, "parameters": {"sede": 7}}
    return Case("unknown-key", config, lambda out: digests(out) == digests(tmp / "plain"))


@case
def seed_given_to_one_model(llamas, tmp):
    merge_here(tmp, recipe(SELECT, llamas.base, llamas.subs), "plain")
    config = recipe(SELECT, llamas.base, llamas.subs, model_parameters=[{"seed": 7}, {}, {}])
    return Case("unknown-key", config, lambda out: digests(out) == digests(tmp / "plain"))


@case
def misspelt_method(llamas, tmp):
    return Case("unknown-method", recipe("parameter_selecton", llamas.base, llamas.subs))


@case
def slerp_without_t(llamas, tmp):
    return Case("parameter-missing", recipe("slerp", llamas.base, llamas.subs[:1]))


@case
def negative_weight(llamas, tmp):
    return Case("parameter-invalid", recipe(SELECT, None, llamas.subs, parameters={"weight": -1}))


@case
def list_of_seeds(llamas, tmp):
    return Case("parameter-invalid", recipe(SELECT, None, llamas.subs, parameters={"seed": [1, 2]}))


@case
def no_rounds(llamas, tmp):
    return Case("parameter-invalid", recipe(RESAMPLE, llamas.base, llamas.subs, parameters={"rounds": 0}))


@case
def infinite_weight(llamas, tmp):
    config = recipe("linear", None, llamas.subs, parameters={"weight": float("inf")})
    return Case("weight-not-finite", config, not_finite)


@case
def all_weights_zero_in_one_layer(llamas, tmp):
    weight = [{"filter": "layers.1.mlp", "value": 0}, {"value": 1}]
    return Case("weights-zero", recipe(SELECT, llamas.base, llamas.subs, parameters={"weight": weight}))


@case
def gradient_that_starts_at_zero(llamas, tmp):
    return Case("weights-zero", recipe(RESAMPLE, llamas.base, llamas.subs, parameters={"weight": [0, 1]}))


@case
def linear_weights_that_cancel(llamas, tmp):
    config = recipe("linear", None, llamas.subs[:2], model_parameters=[{"weight": 1}, {"weight": -1}])
    return Case("weights-zero", config, not_finite)


@case
def unknown_dtype(llamas, tmp):
    return Case("dtype-unknown", recipe(SELECT, llamas.base, llamas.subs, dtype="bf16"))


@case
def integer_out_dtype(llamas, tmp):
    def wrong(out):
        return all(t.dtype == torch.int64 for t in tensors_of(out).values())

    return Case("dtype-unknown", recipe(SELECT, llamas.base, llamas.subs, out_dtype="int64"), wrong)


@case
def unknown_chat_template(llamas, tmp):
    config = recipe(SELECT, llamas.base, llamas.subs, chat_template="chatlm", tokenizer={"source": "base"})
    return Case("chat-template", config)


@case
def too_many_models_for_slerp(llamas, tmp):
    return Case("inputs", recipe("slerp", llamas.base, llamas.subs, parameters={"t": 0.5}))


@case
def resampling_without_base(llamas, tmp):
    return Case("inputs", recipe(RESAMPLE, None, llamas.subs))


@case
def the_same_model_twice(llamas, tmp):
    return Case("inputs", recipe(SELECT, None, [llamas.subs[0], llamas.subs[0]]))


@case
def missing_model(llamas, tmp):
    return Case("model-missing", recipe(SELECT, llamas.base, [llamas.subs[0], tmp / "absent"]))


@case
def model_without_weights(llamas, tmp):
    folder = variant(llamas.subs[0], tmp / "sub")
    (folder / "model.safetensors").unlink()
    return Case("model-missing", recipe(SELECT, llamas.base, [folder]))


@case
def index_naming_a_missing_shard(llamas, tmp):
    from checkpoints import reshard

    folder = reshard(llamas.subs[0], tmp / "sub", 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return Case("model-missing", recipe(SELECT, llamas.base, [folder]))


@case
def truncated_safetensors(llamas, tmp):
    folder = variant(llamas.subs[0], tmp / "sub")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return Case("model-unreadable", recipe(SELECT, llamas.base, [folder]))


@case
def hub_id_offline(llamas, tmp):
    return Case("hub-unreachable", recipe(SELECT, llamas.base, ["nobody/absent"]))


@case
def gguf_file(llamas, tmp):
    folder = tmp / "gguf"
    folder.mkdir()
    shutil.copy(llamas.base / "config.json", folder)
    (folder / "model-Q4.gguf").write_bytes(b"GGUF")
    return Case("model-quantised", recipe(SELECT, llamas.base, [folder]))


@case
def gptq(llamas, tmp):
    def quantise(tensors):
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            tensors[name.replace("weight", "qweight")] = tensors.pop(name).to(torch.int32)

    folder = variant(llamas.subs[0], tmp / "sub", {"quantization_config": {"quant_method": "gptq"}}, quantise)
    return Case("model-quantised", recipe(SELECT, llamas.base, [folder]))


@case
def float8_with_scales(llamas, tmp):
    def quantise(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name + "_scale_inv"] = torch.full((1,), 2.0)
        tensors[name] = (tensors[name].float() / 2).to(torch.float8_e4m3fn)

    def wrong(out):  # the scale is lost
        return not any("scale" in name for name in tensors_of(out))

    folder = variant(llamas.subs[0], tmp / "sub", None, quantise)
    return Case("model-quantised", recipe(SELECT, llamas.base, [folder], dtype="bfloat16"), wrong)


@case
def config_of_an_unknown_type(llamas, tmp):
    folder = variant(llamas.subs[0], tmp / "sub", {"model_type": "lama"})
    return Case("config-invalid", recipe(SELECT, llamas.base, [folder]))


@case
def lora_without_a_cache(llamas, tmp):
    adapter = tmp / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    return Case("lora-cache", recipe(SELECT, llamas.base, [f"{llamas.base}+{adapter}"]))


def write_adapter(folder: Path, rows: int = 48, **settings: Any) -> Path:
    """Save what peft saves for a LoRA of one layer's up_proj of the Llamas here."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    up = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {f"{up}.lora_A.weight": torch.ones(2, 32), f"{up}.lora_B.weight": torch.ones(rows, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def lora_case(kind: str, llamas, tmp, adapter: Path) -> Case:
    config = recipe(SELECT, llamas.base, [f"{llamas.base}+{adapter}", llamas.subs[1]])
    return Case(kind, config, None, {"lora_merge_cache": str(tmp / "cache")})


@case
def lora_without_weights(llamas, tmp):
    adapter = write_adapter(tmp / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    return lora_case("model-missing", llamas, tmp, adapter)


@case
def lora_config_that_is_no_json(llamas, tmp):
    adapter = write_adapter(tmp / "adapter")
    (adapter / "adapter_config.json").write_text("{")
    return lora_case("model-unreadable", llamas, tmp, adapter)


@case
def lora_config_without_a_type(llamas, tmp):
    adapter = write_adapter(tmp / "adapter")
    (adapter / "adapter_config.json").write_text('{"r": 2}')
    return lora_case("lora-invalid", llamas, tmp, adapter)


@case
def lora_of_another_width(llamas, tmp):
    config = recipe(SELECT, llamas.base, [f"{llamas.base}+{write_adapter(tmp / 'adapter', rows=56)}", llamas.subs[1]])
    return Case("lora-invalid", config, None, {"lora_merge_cache": str(tmp / "cache")})


@case
def lora_of_another_rank(llamas, tmp):
    return lora_case("lora-invalid", llamas, tmp, write_adapter(tmp / "adapter", r=5))


@case
def lora_cache_left_unfinished(llamas, tmp):
    from mergekit.common import ModelReference

    adapter = tmp / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    name = f"{llamas.base}+{adapter}"
    reference = ModelReference.parse(name)
    (tmp / "cache" / f"{reference.model._unique_id()}_{reference.lora._unique_id()}").mkdir(parents=True)
    return Case("lora-cache-stale", recipe(SELECT, llamas.base, [name]), None, {"lora_merge_cache": str(tmp / "cache")})


@case
def mistral_among_llamas(llamas, tmp):
    config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    folder = variant(llamas.subs[0], tmp / "sub", config)
    return Case("architecture-differs", recipe(SELECT, llamas.base, [folder]))


@case
def fewer_layers(llamas, tmp):
    folder = variant(llamas.subs[0], tmp / "sub", {"num_hidden_layers": 2})
    return Case("layers-differ", recipe(SELECT, llamas.base, [folder]))


def sources_of(first: int, end: int, *models: Path) -> dict:
    return {"sources": [{"model": str(model), "layer_range": [first, end]} for model in models]}


@case
def more_sources_in_the_last_slice(llamas, tmp):
    one, other, _ = llamas.subs
    config = {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "slices": [sources_of(0, 1, other), sources_of(1, 3, one, other)],
    }

    def wrong(out):  # the head is that of the first of two models
        return torch.equal(tensors_of(out)["lm_head.weight"], tensors_of(one)["lm_head.weight"])

    return Case("slices-uneven", config, wrong)


@case
def layers_beyond_the_last(llamas, tmp):
    sources = [{"model": str(llamas.base), "layer_range": [2, 5]}]
    return Case("layer-range", {"merge_method": "passthrough", "slices": [{"sources": sources}]})


@case
def layers_backwards(llamas, tmp):
    def sources(first, end):
        return {"sources": [{"model": str(llamas.base), "layer_range": [first, end]}]}

    def wrong(out):  # the config counts the slice as less than nothing
        layers = {name.split(".")[2] for name in tensors_of(out) if ".layers." in name}
        return json.loads((out / "config.json").read_text())["num_hidden_layers"] != len(layers)

    return Case("layer-range", {"merge_method": "passthrough", "slices": [sources(0, 3), sources(2, 1)]}, wrong)


@case
def missing_tensor(llamas, tmp):
    folder = variant(llamas.subs[0], tmp / "sub", None, lambda t: t.pop("model.norm.weight"))
    return Case("tensor-missing", recipe(SELECT, llamas.base, [folder]))


@case
def base_without_an_optional_tensor(llamas, tmp):
    def drop(tensors):
        # The head falls back to the embedding, so both go.
        del tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]

    base = variant(llamas.base, tmp / "base2", None, drop)
    return Case("tensor-missing", recipe(SELECT, base, llamas.subs))


@case
def larger_vocabulary(llamas, tmp):
    def grow(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:2]])

    folder = variant(llamas.subs[0], tmp / "sub", {"vocab_size": 98}, grow)
    return Case("shapes-differ", recipe(SELECT, llamas.base, [folder]))


@case
def integers_in_one_model(llamas, tmp):
    name = "model.norm.weight"
    folder = variant(llamas.subs[0], tmp / "sub", None, lambda t: t.update({name: t[name].to(torch.int8)}))
    return Case("tensor-dtype", recipe(SELECT, llamas.base, [folder]))


@case
def float8_among_bfloat16(llamas, tmp):
    name = "model.norm.weight"
    folder = variant(llamas.subs[0], tmp / "sub", None, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    return Case("tensor-dtype", recipe(SELECT, llamas.base, [folder]))


@case
def float8_for_a_method_that_computes(llamas, tmp):
    def cast(tensors):
        tensors.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})

    folders = [variant(sub, tmp / sub.name, None, cast) for sub in (llamas.base, *llamas.subs)]
    return Case("dry-run", recipe("task_arithmetic", folders[0], folders[1:], parameters={"weight": 0.5}))


@case
def swapped_tokens(llamas, tmp):
    folder = variant(llamas.subs[0], tmp / "sub")
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["t3"], vocabulary["t4"] = 4, 3
    file.write_text(json.dumps(described))

    def wrong(out):  # the output's tokenizer is the base's, and its row 3 mixes t3 of the base with the sub-model's t4
        ids = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
        rows = [tensors_of(model)["model.embed_tokens.weight"][3].float() for model in (llamas.base, folder)]
        mixed = tensors_of(out)["model.embed_tokens.weight"][3].float()
        return ids["t3"] == 3 and torch.allclose(mixed, sum(rows) / 2, atol=0.01)

    return Case(
        "tokenizers-differ", recipe("linear", llamas.base, [llamas.base, folder], parameters={"weight": 1}), wrong
    )


def does_not_load(out: Path) -> bool:
    from transformers import AutoModelForCausalLM

    with pytest.raises(Exception, match=r"size|mismatch"):
        AutoModelForCausalLM.from_pretrained(out)
    return True


@case
def vocab_size_that_is_not_the_embeddings(llamas, tmp):
    base = variant(llamas.base, tmp / "base2", {"vocab_size": 90})
    return Case("config-invalid", recipe(SELECT, base, llamas.subs), does_not_load)


@case
def token_from_a_model_that_has_it_not(llamas, tmp):
    tokens = {"<new>": {"source": {"kind": "model_token", "model": str(llamas.subs[0]), "token": "absent"}}}
    config = recipe(SELECT, llamas.base, llamas.subs, tokenizer={"source": "base", "tokens": tokens})
    return Case("tokenizer-invalid", config)


@case
def tokenizer_without_files(llamas, tmp):
    base = variant(llamas.base, tmp / "base2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).unlink()
    return Case("tokenizer-invalid", recipe(SELECT, base, llamas.subs, tokenizer={"source": "base"}))


@case
def new_token_without_a_source(llamas, tmp):
    tokenizer = {"source": "base", "tokens": {"<new>": {}}}
    return Case("tokenizer-invalid", recipe(SELECT, llamas.base, llamas.subs, tokenizer=tokenizer))


@case
def forced_token_without_a_source(llamas, tmp):
    tokenizer = {"source": "base", "tokens": {"t1": {"force": True}}}
    return Case("tokenizer-invalid", recipe(SELECT, llamas.base, llamas.subs, tokenizer=tokenizer))


@case
def module_that_is_not_there(llamas, tmp):
    models = [{"model": str(sub)} for sub in llamas.subs]
    return Case("plan-failed", {"merge_method": SELECT, "modules": {"text": {"models": models}}})


@case
def names_that_the_architecture_does_not_list(llamas, tmp):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    for name in ("a", "b"):
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16))
        model.save_pretrained(tmp / name)

    def wrong(out):  # no layer is left
        return not any(".layer." in name for name in tensors_of(out))

    config = recipe("linear", None, [tmp / "a", tmp / "b"], parameters={"weight": 1})
    return Case("tensor-ignored", config, wrong)


@case
def output_over_an_input(llamas, tmp):
    sub = variant(llamas.subs[0], tmp / "out")
    before = digests(sub)
    return Case("out-is-input", recipe(SELECT, llamas.base, [sub, llamas.subs[1]]), lambda out: digests(out) != before)


@case
def output_where_a_file_is(llamas, tmp):
    (tmp / "out").write_text("")
    return Case("out-not-writable", recipe(SELECT, llamas.base, llamas.subs))


@case
def unsharded_weights_of_an_earlier_merge(llamas, tmp):
    out = variant(llamas.base, tmp / "out")

    def wrong(_out):
        from transformers import AutoModelForCausalLM

        # transformers loads the weights that were there before
        loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
        return torch.equal(loaded["model.norm.weight"], tensors_of(llamas.base)["model.norm.weight"]) and (
            torch.equal(loaded["lm_head.weight"], tensors_of(llamas.base)["lm_head.weight"])
        )

    config = recipe("linear", None, llamas.subs, parameters={"weight": 1})
    return Case("out-stale", config, wrong, {"out_shard_size": 20_000})


@case
def index_of_an_earlier_merge(llamas, tmp):
    from checkpoints import reshard

    out = reshard(llamas.base, tmp / "out", 2)

    def wrong(_out):
        from mergekit.io import ShardedTensorIndex

        # mergekit reads the index that was there before
        return len(ShardedTensorIndex.from_disk(str(out)).shards) == 2

    return Case("out-stale", recipe(SELECT, llamas.base, llamas.subs), wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_an_error_makes_the_merge_fail_or_go_silently_wrong(name, llamas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CASES[name](llamas, tmp_path)
    report = checked(tmp_path, found.config, tmp_path / "out", **(found.options or {}))
    assert found.kind in kinds(report, Severity.ERROR), [str(f) for f in report.findings]
    assert not report.passes()
    if found.wrong is None:
        with pytest.raises(Exception, match=r"."):
            merge_here(tmp_path, found.config, **(found.options or {}))
    else:
        assert found.wrong(merge_here(tmp_path, found.config, **(found.options or {})))


# Shown in tests of their own below, since they need another environment or text.
ELSEWHERE = {"plugin-inactive", "local-path-like-hub-id", "disk-full", "duplicate-key"}


def test_every_kind_of_error_is_shown():
    source = "".join(
        file.read_text() for file in (Path(__file__).parents[1] / "merge_methods/mergekit_select").glob("*.py")
    )
    shown = {function.__name__ for function in CASES.values()}
    assert len(shown) == len(CASES)
    never_errors = {
        "base-parameter-ignored", "no-base-model", "tokenizer-union", "hub-id-not-pinned", "model-pickled",
        "model-ambiguous", "remote-code", "same-file", "tensor-partial", "integer-tensor",
        "dtypes-mixed", "base-dtype", "ties-differ", "tokenizer-missing", "not-known", "out-name", "memory",
    }  # fmt: skip
    covered = set(re.findall(r'Case\(\s*"([a-z-]+)"', Path(__file__).read_text())) | ELSEWHERE
    assert covered | never_errors == set(KINDS)
    for kind in never_errors:
        assert f'error("{kind}"' not in source
        assert f'error(\n                "{kind}"' not in source


GOOD: dict[str, Callable[[Any], dict]] = {
    "selection": lambda m: recipe(SELECT, m.base, m.subs),
    "selection without a base": lambda m: recipe(SELECT, None, m.subs),
    "resampling": lambda m: recipe(RESAMPLE, m.base, m.subs, parameters={"rounds": 1, "seed": 3, "draws": 1}),
    "a gradient": lambda m: recipe(SELECT, m.base, m.subs, model_parameters=[{"weight": [0, 1]}, {}, {}]),
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
        "merge_method": SELECT,
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
        SELECT, m.base, m.subs, tokenizer={"source": "base", "pad_to_multiple_of": 64}, chat_template="chatml"
    ),
    "a union of tokenizers": lambda m: recipe(SELECT, m.base, m.subs, tokenizer_source="union"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GOOD)
def test_a_good_recipe_has_no_errors_and_merges(name, llamas, tmp_path):
    config = GOOD[name](llamas)
    report = checked(tmp_path, config, tmp_path / "out")
    assert not report.of(Severity.ERROR), [str(f) for f in report.findings]
    written = tensors_of(merge_here(tmp_path, config))
    (cost,) = report.costs
    assert cost.tensors == len(written)
    assert cost.bytes_written == sum(tensor.numel() * tensor.element_size() for tensor in written.values())


def test_every_registered_method_has_a_good_recipe(llamas):
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


def test_a_recipe_without_anything_wrong_gives_nothing_but_its_cost(llamas, tmp_path):
    report = checked(tmp_path, recipe(SELECT, llamas.base, llamas.subs), tmp_path / "out")
    assert report.findings == ()
    (cost,) = report.costs
    stored = sum(tensor.numel() * 2 for tensor in tensors_of(llamas.base).values())
    assert (cost.bytes_written, cost.bytes_read) == (stored, 4 * stored)
    assert cost.peak_tensor in ("model.embed_tokens.weight", "lm_head.weight")
    largest = 96 * 32 * 2
    assert cost.peak_memory == stored + 5 * largest + (64 << 20)


# --- warnings and notes


def only(report, kind: str):
    found = [finding for finding in report.findings if finding.kind == kind]
    assert len(found) == 1, [str(f) for f in report.findings]
    return found[0]


def test_a_parameter_given_to_the_base_is_ignored(llamas, tmp_path):
    config = recipe(SELECT, llamas.base, [llamas.base, *llamas.subs], model_parameters=[{"weight": 2}, {}, {}, {}])
    finding = only(checked(tmp_path, config), "base-parameter-ignored")
    assert str(finding) == (
        "warning base-parameter-ignored at models[0].parameters.weight: mergekit ignores weight for the base model "
        "(got 2); remove it"
    )


def test_parameters_of_other_methods_are_a_warning(llamas, tmp_path):
    config = recipe(SELECT, llamas.base, llamas.subs, parameters={"int8_mask": True})
    assert only(checked(tmp_path, config), "unknown-key").severity is Severity.WARNING


def test_mixed_dtypes_and_a_base_in_another(llamas, tmp_path):
    def widen(tensors):
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    base = variant(llamas.base, tmp_path / "base32", None, widen)
    report = checked(tmp_path, recipe(RESAMPLE, base, llamas.subs))
    assert "here float32" in only(report, "dtypes-mixed").message
    assert "float32 in" in only(report, "base-dtype").value
    report = checked(tmp_path, recipe(RESAMPLE, base, llamas.subs, dtype="bfloat16"))
    assert not {"dtypes-mixed", "base-dtype"} & set(kinds(report))


def test_a_link_to_the_same_file(llamas, tmp_path):
    (tmp_path / "copy").symlink_to(llamas.subs[0])
    report = checked(tmp_path, recipe(SELECT, llamas.base, [llamas.subs[0], tmp_path / "copy"]))
    assert only(report, "same-file").place == "models[1].model"


def test_no_base_model_matters_where_models_differ(llamas, tmp_path):
    assert only(checked(tmp_path, recipe(SELECT, None, llamas.subs)), "no-base-model").severity is Severity.NOTE
    other = variant(llamas.subs[2], tmp_path / "sub", {"rope_theta": 20000.0})
    report = checked(tmp_path, recipe(SELECT, None, [*llamas.subs[:2], other]))
    assert only(report, "no-base-model").severity is Severity.WARNING


def test_union_ties_and_tensors_left_out(llamas, tmp_path):
    other = variant(
        llamas.subs[0], tmp_path / "sub", {"tie_word_embeddings": True}, lambda t: t.update(extra=torch.zeros(2))
    )
    report = checked(tmp_path, recipe(SELECT, llamas.base, [other, llamas.subs[1]], tokenizer={"source": "union"}))
    assert {"tokenizer-union", "ties-differ", "tensor-ignored"} <= set(kinds(report, Severity.WARNING))
    assert "extra" in only(report, "tensor-ignored").place
    assert report.passes()
    assert not report.passes(strict=True)


def test_an_output_name_that_ends_with_a_slash(llamas, tmp_path):
    report = checked(tmp_path, recipe(SELECT, llamas.base, llamas.subs), f"{tmp_path}/out/")
    assert kinds(report) == ["out-name"]


def test_a_lora_cache_older_than_its_adapter(llamas, tmp_path):
    from mergekit.common import ModelReference

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    name = f"{llamas.base}+{adapter}"
    reference = ModelReference.parse(name)
    merged = tmp_path / "cache" / f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    shutil.copytree(llamas.subs[0], merged)
    for file in merged.iterdir():
        os.utime(file, (1, 1))
    config = recipe(SELECT, llamas.base, [name, llamas.subs[1]])
    report = checked(tmp_path, config, lora_merge_cache=str(tmp_path / "cache"))
    assert only(report, "lora-cache-stale").severity is Severity.WARNING
    assert report.passes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [{}, {"r": 3, "rank_pattern": {"up_proj": 2}}, {"r": 7, "rank_pattern": {"layers.0.mlp.up_proj": 2}}],
)
def test_a_lora_that_fits(llamas, tmp_path, settings):
    name = f"{llamas.base}+{write_adapter(tmp_path / 'adapter', **settings)}"
    config = recipe(SELECT, llamas.base, [name, llamas.subs[1]])
    report = checked(tmp_path, config, lora_merge_cache=str(tmp_path / "cache"))
    assert not report.of(Severity.ERROR), [str(f) for f in report.findings]
    assert "not-known" not in kinds(report)
    merge_here(tmp_path, config, lora_merge_cache=str(tmp_path / "cache"))


def test_what_a_lora_does_cannot_always_be_known(llamas, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    up = "base_model.model.elsewhere.up_proj"
    tensors = {f"{up}.lora_A.weight": torch.ones(2, 32), f"{up}.lora_B.weight": torch.ones(48, 2)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = recipe(SELECT, llamas.base, [f"{llamas.base}+{adapter}", llamas.subs[1]])
    for change in ({}, {"peft_type": "IA3"}, {"use_qalora": True}):
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        report = checked(tmp_path, config, lora_merge_cache=str(tmp_path / "cache"))
        assert report.passes(), [str(f) for f in report.findings]
        assert "not-known" in kinds(report)


@pytest.mark.filterwarnings("ignore")
def test_fewer_sources_in_the_last_slice(llamas, tmp_path):
    config = {
        "merge_method": SELECT,
        "slices": [sources_of(0, 1, *llamas.subs[:2]), sources_of(1, 3, llamas.subs[1])],
    }
    report = checked(tmp_path, config)
    assert report.passes(), [str(f) for f in report.findings]
    assert report.costs[0].tensors == len(tensors_of(merge_here(tmp_path, config)))


@pytest.mark.filterwarnings("ignore")
def test_a_token_that_all_models_have_needs_no_source(llamas, tmp_path, capfd):
    tokenizer = {"source": "base", "tokens": {"t1": {}}}
    config = recipe(SELECT, llamas.base, llamas.subs, tokenizer=tokenizer)
    assert checked(tmp_path, config).passes()
    assert capfd.readouterr().err == ""  # mergekit has a progress bar here
    merge_here(tmp_path, config)


@pytest.mark.parametrize("method", [["linear"], {"name": "linear"}, 3, True])
def test_a_method_that_is_no_text(llamas, tmp_path, method):
    report = checked(tmp_path, {**recipe("linear", None, llamas.subs), "merge_method": method})
    assert only(report, "recipe-invalid").place == "merge_method"
    assert kinds(report, Severity.ERROR) == ["recipe-invalid"]


def test_what_an_unknown_chat_template_does_without_a_tokenizer_section(llamas, tmp_path):
    config = recipe(SELECT, llamas.base, llamas.subs, chat_template="chatlm")
    assert "leave an output without a tokenizer" in only(checked(tmp_path, config), "chat-template").message
    out = merge_here(tmp_path, config)
    assert not (out / "tokenizer.json").exists()
    finding = only(checked(tmp_path, {**config, "tokenizer": {"source": "base"}}), "chat-template")
    assert "fail after the merge" in finding.message


def test_the_order_of_a_union_is_not_promised(llamas, tmp_path):
    report = checked(tmp_path, recipe(SELECT, llamas.base, llamas.subs, tokenizer_source="union"))
    finding = only(report, "tokenizer-union")
    assert "before Python 3.12" in finding.message
    assert finding.remedy == "name one model, or base, as the source"


def test_pickles_are_reported_and_never_executed(llamas, tmp_path):
    folder = variant(llamas.subs[0], tmp_path / "sub")
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = recipe(SELECT, llamas.base, [folder, llamas.subs[1]])
    report = checked(tmp_path, config)
    assert kinds(report) == ["model-pickled"]
    merge_here(tmp_path, config)

    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"x": Harmful()}, folder / "pytorch_model.bin")
    report = checked(tmp_path, config)
    assert "model-unreadable" in kinds(report, Severity.ERROR)
    assert not (tmp_path / "executed").exists()


def test_a_disk_that_is_full(llamas, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    report = checked(tmp_path, recipe(SELECT, llamas.base, llamas.subs), tmp_path / "out")
    finding = only(report, "disk-full")
    assert (finding.severity, finding.value) == (Severity.ERROR, "58.8 KB to write, 10 B free")


@pytest.mark.filterwarnings("ignore")
def test_a_plugin_turned_off_and_a_path_like_a_hub_id(llamas, tmp_path, monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled

    monkeypatch.chdir(tmp_path)
    shutil.copytree(llamas.subs[0], "m")
    config = recipe(SELECT, llamas.base, ["m", llamas.subs[1]])
    report = checked(tmp_path, config)
    assert only(report, "local-path-like-hub-id").severity is Severity.ERROR  # offline, as all tests are
    with pytest.raises(OfflineModeIsEnabled):
        merge_here(tmp_path, config)
    monkeypatch.setenv("MERGEKIT_SELECT_DISABLE", "1")
    assert only(checked(tmp_path, config), "plugin-inactive").severity is Severity.ERROR
    code = f"from mergekit.merge_methods import get; get({SELECT!r})"  # in a process that inherits the variable
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Unimplemented merge method" in result.stderr


def test_a_key_that_stands_twice(llamas, tmp_path):
    from mergekit_select.check import check

    text = yaml.safe_dump(recipe(SELECT, llamas.base, llamas.subs, parameters={"seed": 1}))
    file = tmp_path / "recipe.yml"
    file.write_text(f"{text}parameters:\n  weight: 1\n")
    finding = only(check(file), "duplicate-key")
    assert finding.severity is Severity.ERROR
    assert finding.place == f"parameters in line {len(text.splitlines()) + 1}"
    assert "seed" not in yaml.safe_load(file.read_text())["parameters"]  # so the merge would use seed 0


def test_a_file_that_may_not_be_read(llamas, tmp_path):
    folder = variant(llamas.subs[0], tmp_path / "sub")
    (folder / "config.json").chmod(0)
    if os.access(folder / "config.json", os.R_OK):
        pytest.skip("this user may read every file")
    report = checked(tmp_path, recipe(SELECT, llamas.base, [folder]))
    assert only(report, "model-unreadable").message == f"cannot read {folder}/config.json: Permission denied"


def test_multislerp_depends_on_values(llamas, tmp_path):
    report = checked(tmp_path, recipe("multislerp", llamas.base, llamas.subs, parameters={"weight": 1}))
    assert only(report, "not-known").severity is Severity.NOTE


def test_vocabularies_of_different_sizes_are_aligned_or_cut(llamas, tmp_path):
    def grow(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:2]])

    larger = variant(llamas.subs[0], tmp_path / "larger", {"vocab_size": 98}, grow)
    file = larger / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["vocab"].update(new=96, newer=97)
    file.write_text(json.dumps(described))
    config = recipe(SELECT, llamas.base, [larger, llamas.subs[1]])
    assert kinds(checked(tmp_path, config), Severity.ERROR) == ["shapes-differ"]
    for changes, options in (
        ({"tokenizer": {"source": "base"}}, {}),
        ({"tokenizer": {"source": str(larger), "pad_to_multiple_of": 64}}, {}),
        ({}, {"unsafe_truncate_embeddings": True}),
    ):
        report = checked(tmp_path, config | changes, **options)
        assert report.passes()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        held = tensors_of(merge_here(tmp_path, config | changes, **options))
        assert report.costs[0].bytes_written == sum(t.numel() * t.element_size() for t in held.values())


# --- several merges in one file


def test_merges_of_one_file_may_use_each_other(llamas, tmp_path):
    first = recipe("linear", llamas.base, llamas.subs[:2], parameters={"weight": 1}) | {"name": "first"}
    last = recipe(SELECT, llamas.base, ["first", llamas.subs[2]])
    report = checked(tmp_path, [last, first])
    assert report.findings == ()
    assert [cost.merge for cost in report.costs] == ["first", None]
    assert len({cost.bytes_written for cost in report.costs}) == 1


def test_merges_of_one_file_must_not_need_each_other_in_a_circle(llamas, tmp_path):
    documents = [
        recipe("linear", None, [other], parameters={"weight": 1}) | {"name": name} for name, other in ("ab", "ba")
    ]
    report = checked(tmp_path, documents)
    assert only(report, "recipe-invalid").value == "a needs b needs a"
    documents[1]["name"] = "a"
    assert "different names" in only(checked(tmp_path, documents), "recipe-invalid").message


# --- files that are not what they should be

LENGTH = 8


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no safetensors file: it has 0 bytes"),
        (b"\xff" * 20, "is truncated: 20 bytes"),
        ((4).to_bytes(LENGTH, "little") + b"nope", "its header is no JSON"),
        ((2).to_bytes(LENGTH, "little") + b"[]", "its header is no JSON object"),
        ((8).to_bytes(LENGTH, "little") + b'{"a":{}}', "has no dtype, shape and data_offsets for a"),
    ],
)
def test_safetensors_that_are_none(content, says, tmp_path):
    from mergekit_select.safetensors_header import CheckpointError, read_header

    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, r"lies: a of shape \[2\] in float32 takes 8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "lies: a begins at byte 4"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "is truncated: its header describes 16 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "has bytes that belong to no tensor"),
        ({"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype 'F3'"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, r"has \[-2\] for a where whole numbers belong"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 8]}, "where whole numbers belong"),
    ],
)
def test_headers_that_lie(entry, says, tmp_path):
    from mergekit_select.safetensors_header import CheckpointError, read_header

    header = json.dumps({"__metadata__": {"format": "pt"}, "a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(LENGTH, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=says):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("metadata", [None, {}, {"a": "x"}, {"a": 1}, {"a": None}, [], "x"])
def test_metadata_is_accepted_as_safetensors_accepts_it(metadata, tmp_path):
    from safetensors import SafetensorError, safe_open

    from mergekit_select.safetensors_header import CheckpointError, read_header

    entry = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    header = json.dumps({"__metadata__": metadata, "a": entry}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(LENGTH, "little") + header + bytes(8))
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError:
        with pytest.raises(CheckpointError, match="must have text by name in __metadata__"):
            read_header(file)
    else:
        assert read_header(file).keys() == {"a"}


def test_headers_are_read_as_safetensors_reads_them(llamas):
    from mergekit_select.safetensors_header import read_header

    held = tensors_of(llamas.base)
    header = read_header(llamas.base / "model.safetensors")
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in held.items()} == {
        name: (t.shape, f"torch.{t.dtype}") for name, t in header.items()
    }


def test_no_tensor_is_read(llamas, tmp_path, monkeypatch):
    import safetensors

    def refuse(*_args, **_values):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert checked(tmp_path, recipe(RESAMPLE, llamas.base, llamas.subs)).passes()


def test_mergekits_cache_of_models_is_left_as_it_was(llamas, tmp_path):
    from mergekit.io.tasks import LoaderCache

    LoaderCache.loaders.clear()
    checked(tmp_path, recipe(SELECT, llamas.base, llamas.subs))
    assert LoaderCache.loaders == {}
