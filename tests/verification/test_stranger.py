"""What a stranger found who set out to make ``verify`` say SAME of a model that computes something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from mergekit_select.errors import UnreadableError
from mergekit_select.verification import verify
from mergekit_select.verification.companions import companion_problems
from tests.support.adapters import train_adapters
from tests.support.checkpoints import changed, edit_json
from tests.support.models import Family, small_family, write_family, write_tokenizer
from tests.support.recipes import merge, recipe
from tests.verification.support import problems

TOKENS = torch.tensor([[5, 9, 3, 17, 22, 8]])


def generated(folder: Path) -> list[int]:
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder)
    return [*map(int, model.generate(TOKENS, max_new_tokens=6, do_sample=False)[0])]


@pytest.mark.parametrize(("key", "value"), [("attention_chunk_size", 2), ("is_causal", False)])
def test_a_key_that_another_version_of_the_config_does_not_know(out: Path, key: str, value: object) -> None:
    before = generated(out)
    edit_json(out / "config.json", transformers_version="4.57.0", **{key: value})
    assert generated(out) != before
    assert f"{key} must not be set" in problems(verify(out))[0][2]
    edit_json(out / "config.json", **{key: None})
    assert verify(out).same == (key != "is_causal")


def test_an_empty_value_of_such_a_key(out: Path) -> None:
    """What transformers makes of it depends on torch: a mask that is not causal, or a TypeError."""
    edit_json(out / "config.json", transformers_version="4.57.0", is_causal=[])
    assert "is_causal must not be set" in problems(verify(out))[0][2]


def test_a_key_that_the_recipe_gives_and_another_version_lacks(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    edit_json(family.base / "config.json", is_causal=False)
    out = merge(family.recipe(), tmp_path / "out")
    assert verify(out).same
    content = (out / "config.json").read_text()
    (out / "config.json").write_text(content.replace('"is_causal": false,', ""))
    edit_json(out / "config.json", transformers_version="4.57.0")
    assert not verify(out).same


@pytest.mark.parametrize("value", [False, 0, ""])
def test_a_key_that_transformers_obeys_with_a_value_that_counts_as_false(out: Path, value: object) -> None:
    edit_json(out / "config.json", transformers_version="4.57.0", _attn_implementation=value)
    assert not verify(out).same


@pytest.mark.parametrize(("key", "value"), [("experts_implementation", "x"), ("base_model_tp_plan", True)])
def test_a_key_with_which_transformers_loads_nothing(out: Path, key: str, value: object) -> None:
    edit_json(out / "config.json", transformers_version="4.57.0", **{key: value})
    with pytest.raises((TypeError, ValueError)):
        tf.AutoModelForCausalLM.from_pretrained(out)
    assert not verify(out).same


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_a_config_that_transformers_cannot_decode(out: Path, encoding: str) -> None:
    text = (out / "config.json").read_text()
    (out / "config.json").write_bytes(text.encode(encoding))
    with pytest.raises(OSError, match="not a valid JSON file"):
        tf.AutoConfig.from_pretrained(out)
    with pytest.raises(UnreadableError, match=r"config\.json must be JSON, and is not"):
        verify(out)


def mistrals(root: Path) -> Family:
    """Mistrals whose tokenizer has more than 100,000 words: transformers patches no smaller one."""
    config = tf.MistralConfig(
        vocab_size=100_010, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    family = write_family(root, tf.MistralForCausalLM(config))
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(100_001)}, unk_token="w0"))
    splits: Any = [pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    sequence: Any = pre_tokenizers.Sequence(splits)
    tokenizer.pre_tokenizer = sequence
    wrapped: Any = tf.PreTrainedTokenizerFast
    for folder in family.everyone:
        wrapped(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
        edit_json(folder / "tokenizer_config.json", fix_mistral_regex=True)
    return family


def test_the_version_by_which_transformers_patches_tokenizers_of_mistral(tmp_path: Path) -> None:
    def pieces() -> object:
        tokenizer: Any = tf.AutoTokenizer.from_pretrained(str(out))
        return tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("abAB")

    out = merge(mistrals(tmp_path / "models").recipe(), tmp_path / "out")
    before = pieces()
    assert verify(out).same
    edit_json(out / "config.json", transformers_version="4.57.1")
    assert pieces() != before
    assert problems(verify(out))[0][2].startswith("transformers_version must be")


def test_files_beside_an_aligned_tokenizer_are_compared_too(tmp_path: Path) -> None:
    for name in ("expected", "found"):
        write_tokenizer(tmp_path / name, 64)
        (tmp_path / name / "preprocessor_config.json").write_text(f'{{"size": {len(name)}}}')
    (tmp_path / "found" / "tokenizer.json").write_text((tmp_path / "found" / "tokenizer.json").read_text() + "\n")
    found = companion_problems(tmp_path / "found", tmp_path / "expected", aligned=True, reordered=False)
    assert [problem.place for problem in found] == ["preprocessor_config.json"]


def test_an_adapter_that_was_trained_on_since_its_merge_was_cached(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    (adapter,) = train_adapters(family.base, tmp_path, 1)
    config = recipe("parameter_selection", family.base, [f"{family.base}+{adapter}", family.subs[0]])
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
    out = merge(config, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
    assert verify(out, options=options).same
    assert verify(out).same  # nothing of the cache is needed
    file = adapter / "adapter_model.safetensors"
    times = file.stat()
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not verify(out, options=options).same


def test_an_output_that_is_its_own_model(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    out = merge(recipe("passthrough", None, [family.base]), tmp_path / "out")
    text = (out / "mergekit_config.yml").read_text()
    (out / "mergekit_config.yml").write_text(text.replace(str(family.base), str(out)))
    changed(out, lambda tensors: tensors.update({name: tensor + 1 for name, tensor in tensors.items()}))
    with pytest.raises(UnreadableError, match="names the output itself as a model"):
        verify(out)


def of_output(out: Path, _family: Family) -> Path:
    return out / "config.json"


def of_model(_out: Path, family: Family) -> Path:
    return family.base / "tokenizer.json"


@pytest.mark.parametrize("file", [of_output, of_model], ids=lambda file: file.__name__)
def test_a_file_that_changes_while_it_is_verified(file: Callable[[Path, Family], Path], tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    out = merge(family.recipe(), tmp_path / "out")
    moving = file(out, family)

    def swapped_and_swapped_back(tensors: Iterable[Any]) -> Iterable[Any]:
        content, times = moving.read_bytes(), moving.stat()
        moving.write_bytes(b"x" * len(content))
        moving.write_bytes(content)
        os.utime(moving, ns=(times.st_atime_ns, times.st_mtime_ns))
        return tensors

    with pytest.raises(UnreadableError, match=r"has changed while it was verified; verify again"):
        verify(out, progress=swapped_and_swapped_back)


def test_a_null_that_transformers_takes_for_false(out: Path) -> None:
    """Without padding, attention stays causal all the same."""

    def logits() -> torch.Tensor:
        model: Any = tf.AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad():
            found: torch.Tensor = model(TOKENS, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])).logits
        return found

    before = logits()
    edit_json(out / "config.json", transformers_version="4.57.0", is_causal=None)
    assert not torch.equal(logits(), before)
    assert "is_causal must not be set" in problems(verify(out))[0][2]


def test_the_old_name_of_dtype_beside_the_new_one_that_is_null(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    for model in family.everyone:
        content = json.loads((model / "config.json").read_text())
        del content["dtype"]
        (model / "config.json").write_text(json.dumps(content))
    out = merge(family.recipe(), tmp_path / "out")
    assert verify(out).same
    edit_json(out / "config.json", torch_dtype="float16", dtype=None)
    assert tf.AutoModelForCausalLM.from_pretrained(out).dtype == torch.float16
    assert "dtype must not be set" in problems(verify(out))[0][2]


@pytest.mark.parametrize("key", ["_attn_implementation", "experts_implementation", "transformers_weights"])
def test_an_empty_list_with_which_transformers_loads_nothing(out: Path, key: str) -> None:
    edit_json(out / "config.json", transformers_version="4.57.0", **{key: []})
    with pytest.raises((AttributeError, ValueError)):
        tf.AutoModelForCausalLM.from_pretrained(out)
    assert not verify(out).same


@pytest.mark.parametrize("change", [{"metadata": None}, {"metadata": 5}, {}], ids=str)
def test_an_index_without_metadata(shards: Path, change: dict[str, Any]) -> None:
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["metadata"]
    index.write_text(json.dumps({**content, **change}))
    with pytest.raises((KeyError, TypeError)):
        tf.AutoModelForCausalLM.from_pretrained(shards)
    assert [problem[:2] for problem in problems(verify(shards))] == [("inconsistent", index.name)]


def test_config_of_one_model_and_tokenizer_of_another_without_a_base(tmp_path: Path) -> None:
    """mergekit takes both from the same one, whichever it is."""
    family = small_family().copied(tmp_path / "models")
    for number, sub in enumerate(family.subs):
        write_tokenizer(sub, 64, rotated=number)
        edit_json(sub / "config.json", eos_token_id=10 + number)
    text = family.recipe("linear", parameters={"weight": 1})
    del text["base_model"]
    out = merge(text, tmp_path / "out")
    assert verify(out).same
    taken = json.loads((out / "config.json").read_text())["eos_token_id"] - 10
    for number, sub in enumerate(family.subs):
        (out / "tokenizer.json").write_bytes((sub / "tokenizer.json").read_bytes())
        assert verify(out).same == (number == taken)


def test_code_of_a_repository_that_the_base_names_itself(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    edit_json(family.base / "config.json", auto_map={"AutoModel": "org/other--modeling.M"})
    out = merge(family.recipe(), tmp_path / "out")
    assert verify(out).same
    for place in ("modeling.M", f"{family.base}--modeling.M", "evil/code--modeling.M"):
        edit_json(out / "config.json", auto_map={"AutoModel": place})
        assert "auto_map" in problems(verify(out))[0][2], place


@pytest.mark.parametrize("name", ["prophetnet.tokenizer", "tokenizer.model.", "tokenizer.model.v3"])
def test_a_vocabulary_that_transformers_opens(name: str, out: Path) -> None:
    """It looks for ``tokenizer\\.model\\.*`` where there is no tokenizer.json."""
    (out / name).write_text("x")
    assert [problem[:2] for problem in problems(verify(out))] == [("stale", name)]


def test_a_pickle_of_negated_or_sparse_tensors(tmp_path: Path) -> None:
    out = merge(small_family().recipe(dtype="float32"), tmp_path / "out", safe_serialization=False)
    file, name = out / "pytorch_model.bin", "model.norm.weight"
    tensors = torch.load(file)
    whole = tensors[name]
    torch.save({**tensors, name: torch._neg_view(-whole)}, file)
    assert verify(out).same
    torch.save({**tensors, name: torch._neg_view(whole)}, file)
    assert [difference.tensor for difference in verify(out).differences] == [name]
    torch.save({**tensors, name: whole.to_sparse()}, file)
    with pytest.raises(UnreadableError, match="must hold dense tensors"):
        verify(out)
