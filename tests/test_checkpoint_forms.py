"""Checkpoints in every form that mergekit reads, LoRA adapters among them, merge to the bits that they should."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

import expectation
from architectures import WORKING, write_family
from checkpoints import merge, merge_here, recipe, reshard, tensors_of, write_llama
from compatibility import METHODS, shows
from expectation import Stored
from forms import copied, edit_config, in_dtype, opened, read_all, rows_of, stored, wanted, without

SELECTION, RESAMPLING = METHODS
SHARDS = [None, 2, 5, 3]
both_methods = pytest.mark.parametrize("method", METHODS)


def assert_loads(folder: Path, model: type = tf.LlamaForCausalLM) -> None:
    _, report = model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report


@shows("Checkpoints", "one file and several shards, each model sharded in its own way")
@both_methods
def test_models_sharded_in_different_ways(llamas, tmp_path, method):
    base, *subs = [
        reshard(folder, tmp_path / folder.name, count) if count else folder
        for folder, count in zip([llamas.base, *llamas.subs], SHARDS, strict=True)
    ]
    out = merge_here(tmp_path, recipe(method, base, subs))
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))
    assert_loads(out)


@shows("Checkpoints", lambda lazy: f"`.bin` files, with{'' if lazy else 'out'} `--lazy-unpickle`")
@both_methods
@pytest.mark.parametrize("lazy", [False, True])
def test_pickled_checkpoints(llamas, tmp_path, method, lazy):
    def pickled(source: Path) -> Path:
        target = copied(source, tmp_path / source.name)
        torch.save(tensors_of(source), target / "pytorch_model.bin")
        (target / "model.safetensors").unlink()
        return target

    base, *subs = map(pickled, [llamas.base, *llamas.subs])
    out = merge_here(tmp_path, recipe(method, base, subs), lazy_unpickle=lazy)
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))
    assert_loads(out)


def tied(source: Path, target: Path) -> Path:
    copied(source, target, without("lm_head.weight"))
    return edit_config(target, tie_word_embeddings=True)


@shows("Checkpoints", "embeddings tied in all models", note="untied in all: every other row; tied ones are drawn once")
@both_methods
def test_tied_embeddings_are_drawn_once(llamas, tmp_path, method):
    base, *subs = [tied(folder, tmp_path / folder.name) for folder in [llamas.base, *llamas.subs]]
    out = merge_here(tmp_path, recipe(method, base, subs))
    found = expectation.read(out)
    assert "lm_head.weight" not in found
    expectation.assert_same(found, wanted(method, base, subs))
    assert_loads(out)


@shows(
    "Checkpoints",
    lambda which: f"embeddings tied in {which}, untied in the others",
    note="two tensors, each with draws of its own; the tied one stands in for both",
)
@both_methods
@pytest.mark.parametrize("which", ["one sub-model", "the base"])
def test_tied_and_untied_embeddings_mixed(llamas, tmp_path, method, which):
    folders = [llamas.base, *llamas.subs]
    place = 1 if which == "one sub-model" else 0
    folders[place] = tied(folders[place], tmp_path / "tied")
    out = merge_here(tmp_path, recipe(method, folders[0], folders[1:]))
    tensors = read_all(*folders)
    tensors[place]["lm_head.weight"] = tensors[place]["model.embed_tokens.weight"]
    expectation.assert_same(expectation.read(out), wanted(method, tensors[0], tensors[1:]))
    assert_loads(out)
    model = tf.LlamaForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@shows("Checkpoints", "tensors that the architecture does not know", note="mergekit leaves them out without a word")
@both_methods
def test_extra_tensors_are_left_out(llamas, tmp_path, method):
    extra = copied(llamas.subs[0], tmp_path / "extra", lambda tensors: {**tensors, "more.weight": torch.ones(3)})
    out = merge_here(tmp_path, recipe(method, llamas.base, [extra, *llamas.subs[1:]]))
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))


@pytest.fixture(scope="module")
def opts(tmp_path_factory) -> tuple[Path, list[Path]]:
    """Models of an architecture that mergekit infers, so that every tensor is optional."""
    opt = next(architecture for architecture in WORKING if architecture.title == "OPT")
    return write_family(opt, tmp_path_factory.mktemp("opts"))


OPTIONAL = "model.decoder.layers.1.fc1.bias"


@shows("Checkpoints", "an optional tensor that one sub-model lacks", note="drawn among those that have it")
@both_methods
def test_a_tensor_is_drawn_among_the_sub_models_that_have_it(opts, tmp_path, method):
    base, subs = opts
    lacking = copied(subs[1], tmp_path / "lacking", without(OPTIONAL))
    out = merge_here(tmp_path, recipe(method, base, [subs[0], lacking, subs[2]]), copy_tokenizer=False)
    found, all_have = expectation.read(out), wanted(method, base, subs)
    two = [{OPTIONAL: tensors[OPTIONAL]} for tensors in read_all(base, subs[0], subs[2])]
    expectation.assert_same(found, all_have | wanted(method, two[0], two[1:]))


@shows("Checkpoints", "an optional tensor that only one sub-model or only the base has", note="copied")
@both_methods
@pytest.mark.parametrize("holder", [0, 2])
def test_a_tensor_that_only_one_has_is_copied(opts, tmp_path, method, holder):
    base, subs = opts
    folders = [
        folder if k == holder else copied(folder, tmp_path / folder.name, without(OPTIONAL))
        for k, folder in enumerate([base, *subs])
    ]
    out = merge_here(tmp_path, recipe(method, folders[0], folders[1:]), copy_tokenizer=False)
    expectation.assert_same(
        {OPTIONAL: expectation.read(out)[OPTIONAL]}, {OPTIONAL: expectation.read(folders[holder])[OPTIONAL]}
    )


@shows(
    "Checkpoints",
    "an optional tensor that the base lacks and sub-models have, with `base_model`",
    gap=True,
    note="mergekit refuses it for every method to which the base is not one input among others; `linear` averages the "
    "rest. Selection does without `base_model`",
)
def test_a_tensor_that_the_base_lacks_is_mergekits_error(opts, tmp_path):
    base, subs = opts
    lacking = copied(base, tmp_path / "lacking", without(OPTIONAL))
    for method in [*METHODS, "task_arithmetic", "multislerp"]:
        config = recipe(method, lacking, subs, parameters={"weight": 1.0})
        with pytest.raises(ValueError, match=f"^Base input is not present in merge inputs for {re.escape(OPTIONAL)}$"):
            merge_here(tmp_path, config, name=method, copy_tokenizer=False)
    out = merge_here(tmp_path, recipe(SELECTION, None, subs), copy_tokenizer=False)
    expectation.assert_same(expectation.read(out), wanted(SELECTION, base, subs))


MIXED = [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def in_fp32(llamas, tmp_path_factory) -> tuple[Path, list[Path]]:
    """The family in fp32, with bits below what the others hold."""
    folder = tmp_path_factory.mktemp("fp32")

    def finer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.float() * 1.0001 for name, tensor in tensors.items()}

    base, *subs = [copied(source, folder / source.name, finer) for source in [llamas.base, *llamas.subs]]
    return base, subs


def cast(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    return copied(folder, target, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})


@shows("Checkpoints", lambda dtype: f"weights in {dtype}")
@both_methods
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(in_fp32, tmp_path, method, dtype):
    base, *subs = [cast(folder, tmp_path / folder.name, DTYPES[dtype]) for folder in [in_fp32[0], *in_fp32[1]]]
    out = merge_here(tmp_path, recipe(method, base, subs))
    expectation.assert_same(expectation.read(out), wanted(method, base, subs))


@shows(
    "Checkpoints",
    lambda settings: (
        "fp32, fp16 and bf16 mixed, " + (" and ".join(f"`{k}: {v}`" for k, v in settings.items()) or "no `dtype`")
    ),
    note=lambda settings: (
        "`dtype` casts what is drawn from, `out_dtype` the result"
        if settings
        else "mergekit promotes tensor by tensor: the output is fp32"
    ),
)
@both_methods
@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "bfloat16"}, {"out_dtype": "float16"}, {"dtype": "float32", "out_dtype": "bfloat16"}],
    ids=str,
)
def test_mixed_dtypes(in_fp32, tmp_path, method, settings):
    base, subs = in_fp32
    folders = [cast(folder, tmp_path / folder.name, dtype) for folder, dtype in zip([base, *subs], MIXED, strict=True)]
    out = merge_here(tmp_path, recipe(method, folders[0], folders[1:], **settings))
    drawn_in = getattr(torch, settings.get("dtype", "float32"))
    base_tensors, *tensors = [in_dtype(t, drawn_in) for t in read_all(*folders)]
    result = wanted(method, base_tensors, tensors)
    if out_dtype := settings.get("out_dtype"):
        result = in_dtype(result, getattr(torch, out_dtype))
    expectation.assert_same(expectation.read(out), result)


VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def vocabulary(folder: Path) -> dict[str, int]:
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return content["model"]["vocab"] | added


def rotated(source: Path, target: Path) -> Path:
    """The same model with its tokens in another order, and their rows with them."""
    copied(source, target)
    known = vocabulary(source)
    count = len(known) - 1  # the last is <unk>
    file = target / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {t: (k + 1) % count if k < count else k for t, k in known.items()}
    file.write_text(json.dumps(content))
    order = [(k - 1) % count for k in range(count)] + [count]
    tensors = tensors_of(source)
    return rewritten(target, {n: t[order].contiguous() if n in VOCABULARY else t for n, t in tensors.items()})


def rewritten(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_added_tokens(source: Path, target: Path, tokens: list[str]) -> Path:
    """A model that learnt new tokens: the tokenizer knows them, and the vocabulary's tensors have rows for them."""
    copied(source, target)
    tokenizer = tf.AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(target)
    generator = torch.Generator().manual_seed(9)
    tensors = tensors_of(source)
    for name in VOCABULARY:
        rows = torch.randn(len(tokens), tensors[name].shape[1], generator=generator).to(tensors[name].dtype)
        tensors[name] = torch.cat([tensors[name], rows])
    return edit_config(rewritten(target, tensors), vocab_size=len(tokenizer))


def aligned(out: Path, base: Path, subs: list[Path]) -> list[dict[str, Stored]]:
    """Base and sub-models with their rows in the output's order; who lacks a token has the base's or only holder's."""
    target = vocabulary(out)
    order = sorted(target, key=target.__getitem__)
    folders = [base, *subs]
    known, read = [vocabulary(folder) for folder in folders], read_all(*folders)
    result = [dict(tensors) for tensors in read]
    for name in VOCABULARY:
        rows = []
        for own_vocabulary, own in zip(known, read, strict=True):
            picked = []
            for token in order:
                holders = [k for k, v in enumerate(known) if token in v]
                assert token in own_vocabulary or 0 in holders or len(holders) == 1
                source = own if token in own_vocabulary else read[holders[0]]
                place = (own_vocabulary if token in own_vocabulary else known[holders[0]])[token]
                picked.append(rows_of(source[name], [place]).bits)
            rows.append(Stored(own[name].dtype, (len(order), own[name].shape[1]), np.concatenate(picked)))
        for tensors, row in zip(result, rows, strict=True):
            tensors[name] = row
    return result


@shows("Checkpoints", "tokens in different orders, `tokenizer: {source: base}`", note="rows are aligned, then drawn")
@both_methods
def test_another_order_of_tokens_with_the_tokenizer_of_the_base(llamas, tmp_path, method):
    subs = [rotated(llamas.subs[0], tmp_path / "rotated"), *llamas.subs[1:]]
    out = merge_here(tmp_path, recipe(method, llamas.base, subs, tokenizer={"source": "base"}))
    assert vocabulary(out) == vocabulary(llamas.base)
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))  # as if in base order
    assert_loads(out)


@shows("Checkpoints", "tokens added in one sub-model, `tokenizer: {source: base}`", note="they are not in the output")
@both_methods
def test_added_tokens_with_the_tokenizer_of_the_base(llamas, tmp_path, method):
    subs = [with_added_tokens(llamas.subs[0], tmp_path / "added", ["<new>", "<newer>"]), *llamas.subs[1:]]
    out = merge_here(tmp_path, recipe(method, llamas.base, subs, tokenizer={"source": "base"}))
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))
    assert_loads(out)


@shows(
    "Checkpoints",
    "different vocabularies, `tokenizer: {source: union}`",
    note="mergekit orders the tokens by Python's hashes, anew in every run; `PYTHONHASHSEED` helps from Python 3.12 on",
)
@both_methods
def test_the_union_of_vocabularies_under_a_fixed_hash_seed(llamas, tmp_path, method):
    subs = [
        with_added_tokens(llamas.subs[0], tmp_path / "added", ["<new>", "<newer>"]),
        rotated(llamas.subs[1], tmp_path / "rotated"),
        llamas.subs[2],
    ]
    config = recipe(method, llamas.base, subs, tokenizer={"source": "union"})
    for name in ("out", "again") if method == SELECTION else ("out",):
        done = merge(tmp_path, config, "--quiet", name=name, env={"PYTHONHASHSEED": "1"})
        assert done.returncode == 0, done.stderr
        out = tmp_path / name
        base_tensors, *tensors = aligned(out, llamas.base, subs)
        expectation.assert_same(expectation.read(out), wanted(method, base_tensors, tensors))
    # Before Python 3.12 the hash of None, which is part of a model's, is an address: no hash seed fixes the order.
    if method == SELECTION and sys.version_info >= (3, 12):
        assert vocabulary(tmp_path / "out") == vocabulary(tmp_path / "again")
        expectation.assert_same(expectation.read(tmp_path / "again"), expectation.read(tmp_path / "out"))
    assert_loads(out)


@shows(
    "Checkpoints",
    "a token added by the recipe, `tokenizer: {source: MODEL, tokens: …}`",
    note="everyone gets the row that its entry names",
)
@both_methods
def test_a_token_that_the_recipe_adds(llamas, tmp_path, method):
    added = with_added_tokens(llamas.subs[0], tmp_path / "added", ["<new>"])
    subs = [added, *llamas.subs[1:]]
    tokenizer = {"source": str(llamas.subs[2]), "tokens": {"<new>": {"source": str(added)}}}
    out = merge_here(tmp_path, recipe(method, llamas.base, subs, tokenizer=tokenizer))
    assert vocabulary(out) == vocabulary(added)
    base_tensors, *tensors = aligned(out, llamas.base, subs)
    expectation.assert_same(expectation.read(out), wanted(method, base_tensors, tensors))
    assert_loads(out)


@shows(
    "Checkpoints",
    "the same with `source: base`",
    gap=True,
    note="mergekit adds the token to the base's own vocabulary and then finds no row for it: a KeyError",
)
def test_a_token_added_to_the_tokenizer_of_the_base_is_mergekits_error(llamas, tmp_path):
    added = with_added_tokens(llamas.subs[0], tmp_path / "added", ["<new>"])
    tokenizer = {"source": "base", "tokens": {"<new>": {"source": str(added)}}}
    for method in [*METHODS, "linear"]:
        config = recipe(method, llamas.base, [added, *llamas.subs[1:]], tokenizer=tokenizer)
        config["parameters"] = {"weight": 1.0}
        with pytest.raises(KeyError, match="96"):
            merge_here(tmp_path, config, name=method)


@pytest.fixture(scope="module")
def adapters(llamas, tmp_path_factory) -> list[Path]:
    """Three LoRA adapters of the base, as PEFT saves them."""
    import peft

    folder = tmp_path_factory.mktemp("adapters")
    result = []
    for k in range(3):
        model = tf.LlamaForCausalLM.from_pretrained(llamas.base, dtype=torch.bfloat16)
        settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
        with torch.random.fork_rng():
            torch.manual_seed(k)
            model = peft.get_peft_model(model, settings)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data = 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
        model.save_pretrained(folder / f"adapter-{k}")
        result.append(folder / f"adapter-{k}")
    return result


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
def test_lora_adapters(llamas, adapters, tmp_path, method):
    cache = tmp_path / "cache"
    config = recipe(method, llamas.base, [f"{llamas.base}+{adapter}" for adapter in adapters])
    out = merge_here(tmp_path, config, lora_merge_cache=str(cache))
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
def test_adapters_beside_whole_models(llamas, adapters, tmp_path, method):
    config = recipe(method, llamas.base, [f"{llamas.base}+{adapters[0]}", llamas.subs[0]])
    out = merge_here(tmp_path, config, lora_merge_cache=str(tmp_path / "cache"))
    merged = expectation.read(next((tmp_path / "cache").iterdir()))
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, [merged, llamas.subs[0]]))


def test_one_differing_bit_is_noticed():
    """These tests can fail: one bit of one element is enough."""
    one = {"w": stored(torch.ones(4, dtype=torch.bfloat16))}
    other = {"w": stored(torch.tensor([1, 1, 1, 1.0078125], dtype=torch.bfloat16))}
    for check in (expectation.assert_same, lambda a, b: expectation.assert_taken_from(a, [b])):
        check(one, one)
        with pytest.raises(AssertionError):
            check(one, other)


def test_a_llama_and_its_family_differ_where_they_should(llamas, tmp_path):
    """The inputs are worth merging: sub-models share some of the base's bits, and some with each other."""
    base, *subs = read_all(llamas.base, *llamas.subs)
    for sub in subs:
        same = np.concatenate([sub[name].bits == base[name].bits for name in base])
        assert 0.3 < same.mean() < 0.6
    again = write_llama(tmp_path / "again", 1, near=llamas.base)
    expectation.assert_same(expectation.read(again), subs[0])
