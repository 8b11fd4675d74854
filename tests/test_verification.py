from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import registered_methods
from mergekit.options import MergeOptions

import small_models
from mergekit_select.errors import MergekitSelectError
from mergekit_select.output import Problem
from mergekit_select.replay import ReplayError, UnreadableError, read_recipe, relocated
from mergekit_select.verification import Determinism, Difference, Verification, determinism, verify
from mergekit_select.verification_cli import verify_command

TENSORS, PARAMETERS = 21, 19_616


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.merge(small_models.recipe(small_models.family()), tmp_path_factory.mktemp("m") / "out")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("m") / "out"
    return small_models.merge(small_models.recipe(small_models.family()), out, out_shard_size=8_000)


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    return small_models.copied(merged, tmp_path / "out")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return small_models.copied(sharded, tmp_path / "out")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(verify_command, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def kinds(answer: Verification) -> set[str]:
    return {item.kind for item in (*answer.differences, *answer.problems)}


def mixed_dtypes(root: Path, to: Path) -> dict[str, Any]:
    """Return a recipe whose last sub-model is in float32."""
    small_models.copied(root, to)
    small_models.save(to / "c", {name: value.float() for name, value in small_models.load(to / "c").items()})
    return small_models.recipe(to)


class TestSame:
    @pytest.mark.parametrize(
        ("keys", "options"),
        [
            ({}, {}),
            ({"parameters": {"rounds": 1, "seed": 5}}, {}),
            ({"merge_method": "parameter_selection"}, {}),
            ({"merge_method": "linear", "parameters": {"weight": 1}}, {}),
            ({"merge_method": "ties", "parameters": {"weight": 1, "density": 0.5}}, {}),
            ({"merge_method": "model_stock"}, {}),
            ({"merge_method": "sce"}, {}),
            ({"dtype": "float32"}, {}),
            ({"out_dtype": "float16"}, {}),
            ({"dtype": "float32", "out_dtype": "bfloat16"}, {"out_shard_size": 8_000}),
            ({}, {"safe_serialization": False}),
            ({}, {"safe_serialization": False, "out_shard_size": 8_000}),
        ],
        ids=str,
    )
    def test_finished_output(self, keys: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
        recipe = {**small_models.recipe(small_models.family()), **keys}
        answer = verify(small_models.merge(recipe, tmp_path / "out", **options))
        assert answer.same, answer
        assert (answer.tensors, answer.parameters) == (TENSORS, PARAMETERS)
        assert answer.notes == ()

    @pytest.mark.parametrize("out_dtype", [{}, {"out_dtype": "float16"}], ids=str)
    def test_tied_weights(self, tmp_path: Path, out_dtype: dict[str, str]) -> None:
        recipe = small_models.recipe(small_models.family(tied=True), **out_dtype)
        answer = verify(small_models.merge(recipe, tmp_path / "out"))
        assert answer.same
        assert answer.tensors == TENSORS - 1

    def test_aligned_tokenizers(self, tmp_path: Path) -> None:
        root = small_models.family(tokenizer=True)
        aligned = small_models.merge(small_models.recipe(root, tokenizer={"source": "base"}), tmp_path / "aligned")
        answer = verify(aligned)
        assert answer.same
        plain = small_models.merge(small_models.recipe(root), tmp_path / "plain")
        other = verify(aligned, plain / "mergekit_config.yml")
        assert {difference.tensor for difference in other.differences} == {
            "model.embed_tokens.weight",
            "lm_head.weight",
        }

    def test_mixed_dtypes_promote(self, tmp_path: Path) -> None:
        recipe = mixed_dtypes(small_models.family(), tmp_path / "models")
        out = small_models.merge(recipe, tmp_path / "out")
        assert verify(out).same
        assert {value.dtype for value in small_models.load(out).values()} == {torch.float32}

    def test_slices_of_different_layers(self, tmp_path: Path) -> None:
        root = small_models.family()
        slices = [
            {"sources": [{"model": str(root / name), "layer_range": layers} for name in ("base", "a", "b")]}
            for layers in ([0, 2], [1, 2])
        ]
        recipe = {
            "merge_method": "parameter_selection_resampling",
            "base_model": str(root / "base"),
            "slices": slices,
        }
        out = small_models.merge(recipe, tmp_path / "out")
        answer = verify(out)
        assert answer.same
        assert answer.tensors == TENSORS + 9

    def test_recipe_that_mergekit_multi_stored(self, tmp_path: Path) -> None:
        root = small_models.family()
        first = {"name": "first", **small_models.recipe(root)}
        second = {**small_models.recipe(root, "parameter_selection"), "name": "second"}
        second["models"] = [{"model": "first"}, {"model": str(root / "c"), "parameters": {"weight": [1, 2]}}]
        (tmp_path / "multi.yml").write_text(yaml.safe_dump_all([first, second]))
        subprocess.run(
            [
                str(Path(sys.executable).with_name("mergekit-multi")),
                "multi.yml",
                "-I",
                "./merges",
                "--no-copy-tokenizer",
                "--quiet",
            ],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
        stored = yaml.safe_load((tmp_path / "merges/first/mergekit_config.yml").read_text())
        assert "slices" in stored["modules"]["default"]
        assert verify(tmp_path / "merges/first").same
        # Its recipe names ./merges/first, which begins at the folder that mergekit-multi ran in.
        answer = verify(tmp_path / "merges/second", locations={"./merges/first": str(tmp_path / "merges/first")})
        assert answer.same
        assert run(tmp_path / "multi.yml").exit_code == 2
        result = run(tmp_path / "merges/first", "--recipe", tmp_path / "multi.yml")
        assert result.exit_code == 2
        assert "must hold one YAML document" in result.output

    def test_recipe_is_not_modified_and_no_loader_is_kept(self, merged: Path) -> None:
        LoaderCache.loaders.clear()
        config = read_recipe(merged / "mergekit_config.yml")
        before = config.model_dump()
        assert verify(merged).same
        assert LoaderCache.loaders == {}
        assert config.model_dump() == before

    def test_models_that_changed_between_two_calls(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        out = small_models.merge(small_models.recipe(root), tmp_path / "out")
        assert verify(out).same
        tensors = small_models.load(root / "a")
        tensors["model.norm.weight"] += 1
        small_models.save(root / "a", tensors)
        assert {difference.tensor for difference in verify(out).differences} == {"model.norm.weight"}


class TestDifferences:
    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_any_flipped_bit_of_a_tensor(
        self, merged: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        out = small_models.copied(merged, tmp_path_factory.mktemp("flip") / "out")
        path = out / "model.safetensors"
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        position = data.draw(st.integers(header, len(content) - 1))
        bit = data.draw(st.integers(0, 7))
        content[position] ^= 1 << bit
        path.write_bytes(content)
        answer = verify(out)
        (difference,) = answer.differences
        assert difference.kind == "bits"
        assert difference.count == 1
        # The place that is told must be the one that was changed.
        before, after = small_models.load(merged)[difference.tensor], small_models.load(out)[difference.tensor]
        changed = torch.nonzero(before.view(torch.int16) != after.view(torch.int16))
        assert [tuple(row) for row in changed.tolist()] == [difference.index]
        assert f"0x{before.view(torch.int16)[difference.index].item() % 65536:04x}" in str(difference.expected)
        assert f"0x{after.view(torch.int16)[difference.index].item() % 65536:04x}" in str(difference.found)

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_any_flipped_bit_of_a_header(
        self, merged: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        out = small_models.copied(merged, tmp_path_factory.mktemp("flip") / "out")
        path = out / "model.safetensors"
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        result = run(out)
        assert result.exit_code in (1, 2)
        assert result.exit_code == 1 or len(result.output.splitlines()) == 1

    def test_sign_of_a_zero_and_payload_of_a_nan_are_bits_too(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        tensors = small_models.load(root / "a")
        tensors["model.norm.weight"][:2] = torch.tensor([0.0, float("nan")])
        for name in "abc":
            small_models.save(root / name, tensors)
        out = small_models.merge(small_models.recipe(root), tmp_path / "out")
        assert verify(out).same
        tensors = small_models.load(out)
        tensors["model.norm.weight"].view(torch.int16)[:2] ^= torch.tensor([-0x8000, 1], dtype=torch.int16)
        small_models.save(out, tensors)
        (difference,) = verify(out).differences
        assert (difference.count, difference.index) == (2, (0,))
        assert (difference.expected, difference.found) == ("0 (0x0000)", "-0 (0x8000)")

    def test_missing_tensor(self, out: Path) -> None:
        tensors = small_models.load(out)
        del tensors["model.norm.weight"]
        small_models.save(out, tensors)
        assert verify(out).differences == (Difference("model.norm.weight", "missing", "bfloat16 [32]", None),)
        assert run(out).exit_code == 1

    def test_extra_tensor(self, out: Path) -> None:
        small_models.save(out, {**small_models.load(out), "model.more": torch.zeros(2)})
        assert verify(out).differences == (Difference("model.more", "extra", None, "float32 [2]"),)

    def test_renamed_tensor(self, out: Path) -> None:
        tensors = small_models.load(out)
        tensors["norm.weight"] = tensors.pop("model.norm.weight")
        small_models.save(out, tensors)
        assert verify(out).differences == (
            Difference("model.norm.weight", "renamed", "model.norm.weight", "norm.weight"),
        )

    def test_two_tensors_that_changed_names(self, out: Path) -> None:
        tensors = small_models.load(out)
        names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
        small_models.save(out, tensors)
        assert [difference.tensor for difference in verify(out).differences] == names

    def test_changed_dtype_and_shape(self, out: Path) -> None:
        tensors = small_models.load(out)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].view(16, 64)
        small_models.save(out, tensors)
        assert verify(out).differences == (
            Difference(name, "shape", "bfloat16 [32, 32]", "bfloat16 [16, 64]", elements=1024),
            Difference("model.norm.weight", "dtype", "bfloat16 [32]", "float16 [32]", elements=32),
        )

    def test_another_seed_is_another_output(self, out: Path) -> None:
        path = out / "mergekit_config.yml"
        path.write_text(path.read_text() + "parameters: {seed: 1}\n")
        answer = verify(out)
        assert kinds(answer) == {"bits"}
        assert run(out).exit_code == 1


class TestFinished:
    def test_sharded(self, sharded: Path) -> None:
        assert verify(sharded).same

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
    def test_file_that_is_written_last_is_missing(self, shards: Path, file: str) -> None:
        (shards / file).unlink()
        answer = verify(shards)
        assert kinds(answer) == {"unfinished"}
        assert answer.problems[0].place == file
        assert answer.differences == ()
        assert run(shards).exit_code == 1

    def test_missing_shard(self, shards: Path) -> None:
        (shards / "model-00002-of-00007.safetensors").unlink()
        answer = verify(shards)
        assert kinds(answer) == {"unfinished", "missing"}
        assert answer.problems[0].place == "model-00002-of-00007.safetensors"

    def test_interrupted_after_some_shards(self, shards: Path, tmp_path: Path) -> None:
        """What is there when the process ends before the shards get their names."""
        for number in range(1, 8):
            path = shards / f"model-{number:05d}-of-00007.safetensors"
            path.rename(shards / f"model-{number}.safetensors") if number < 4 else path.unlink()
        for file in ("config.json", "model.safetensors.index.json", "mergekit_config.yml"):
            shutil.move(shards / file, tmp_path / file)
        answer = verify(shards)
        assert kinds(answer) == {"unfinished"}
        assert [problem.place for problem in answer.problems][-1] == "mergekit_config.yml"
        with_recipe = verify(shards, tmp_path / "mergekit_config.yml")
        assert kinds(with_recipe) == {"unfinished", "missing"}

    def test_no_recipe(self, out: Path) -> None:
        (out / "mergekit_config.yml").unlink()
        result = run(out)
        assert result.exit_code == 1
        assert "--no-write-model-card" in result.output
        assert "NOT VERIFIED" in result.output

    def test_only_a_recipe(self, out: Path) -> None:
        (out / "model.safetensors").unlink()
        answer = verify(out)
        assert answer.problems == (
            Problem("unfinished", "model.safetensors", "no weights are there: the merge has not ended"),
        )
        assert len(answer.differences) == TENSORS

    def test_sharded_merge_over_an_unsharded_one(self, merged: Path, tmp_path: Path) -> None:
        """The trap: transformers would load the older model.safetensors."""
        root = small_models.family()
        out = small_models.merge(small_models.recipe(root, parameters={"seed": 1}), tmp_path / "out")
        small_models.merge(small_models.recipe(root), out, out_shard_size=8_000)
        answer = verify(out)
        assert {problem.kind for problem in answer.problems} == {"stale"}
        assert kinds(answer) == {"stale", "bits"}

    def test_fewer_shards_over_more(self, shards: Path) -> None:
        small_models.merge(small_models.recipe(small_models.family()), shards, out_shard_size=20_000)
        answer = verify(shards)
        assert kinds(answer) == {"stale"}
        assert len(answer.problems) == 7
        assert "NOT THE SAME" in run(shards).output

    def test_pickled_weights_beside(self, out: Path) -> None:
        small_models.merge(small_models.recipe(small_models.family()), out, safe_serialization=False)
        assert [problem.place for problem in verify(out).problems] == ["pytorch_model.bin"]

    def test_tensor_that_the_index_does_not_name(self, shards: Path) -> None:
        path = shards / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        del index["weight_map"]["model.norm.weight"]
        path.write_text(json.dumps(index))
        assert kinds(verify(shards)) == {"inconsistent"}

    def test_tensor_that_the_index_puts_elsewhere(self, shards: Path) -> None:
        path = shards / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = "model-00001-of-00007.safetensors"
        path.write_text(json.dumps(index))
        assert kinds(verify(shards)) == {"inconsistent"}

    def test_total_size(self, shards: Path) -> None:
        path = shards / "model.safetensors.index.json"
        small_models.edit_json(path, metadata={"total_size": 3})
        (problem,) = verify(shards).problems
        assert "39232 bytes" in problem.text

    @pytest.mark.parametrize("change", ["deleted", "elsewhere"])
    def test_shard_that_the_index_forgets_is_no_other_merges(self, tmp_path: Path, change: str) -> None:
        """Deleting it would destroy the output."""
        shards = small_models.merge(small_models.recipe(small_models.family()), tmp_path / "out", out_shard_size=2_000)
        path = shards / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        files = sorted(index["weight_map"].values())
        alone = next(name for name, file in sorted(index["weight_map"].items()) if files.count(file) == 1)
        shard = index["weight_map"].pop(alone)
        if change == "elsewhere":
            index["weight_map"][alone] = next(file for file in files if file != shard)
        path.write_text(json.dumps(index))
        answer = verify(shards)
        assert kinds(answer) == {"inconsistent"}
        assert shard in {problem.place for problem in answer.problems}
        assert "delete" not in run(shards).output

    def test_index_that_names_nothing(self, shards: Path) -> None:
        small_models.edit_json(shards / "model.safetensors.index.json", weight_map={})
        assert kinds(verify(shards)) == {"inconsistent"}
        assert "delete" not in run(shards).output

    def test_index_that_names_nothing_among_shards_of_two_merges(self, shards: Path) -> None:
        """Which of them is the older cannot be told."""
        small_models.merge(small_models.recipe(small_models.family()), shards, out_shard_size=20_000)
        small_models.edit_json(shards / "model.safetensors.index.json", weight_map={})
        assert {problem.kind for problem in verify(shards).problems} == {"stale"}
        assert "delete" not in run(shards).output

    def test_shards_of_an_older_merge_that_an_entry_names(self, shards: Path) -> None:
        small_models.merge(small_models.recipe(small_models.family()), shards, out_shard_size=20_000)
        path = shards / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = "model-00001-of-00007.safetensors"
        path.write_text(json.dumps(index))
        stale = {problem.place for problem in verify(shards).problems if problem.kind == "stale"}
        assert stale == {f"model-{number:05d}-of-00007.safetensors" for number in range(2, 8)}

    def test_config_of_another_model(self, out: Path) -> None:
        small_models.edit_json(out / "config.json", num_hidden_layers=3)
        (problem,) = verify(out).problems
        assert problem.text == "num_hidden_layers must be 2, as the recipe gives it, got 3"

    @pytest.mark.parametrize(
        ("keys", "text"),
        [
            ({"vocab_size": 63}, "vocab_size must be 64, as the recipe gives it, got 63"),
            ({"head_dim": 4}, "head_dim must be 8, as the recipe gives it, got 4"),
            ({"attention_bias": True}, "attention_bias must be False, as the recipe gives it, got True"),
            ({"hidden_size": None}, "hidden_size must be 32, as the recipe gives it, it is missing"),
            (
                {"architectures": None},
                "architectures must be ['LlamaForCausalLM'], as the recipe gives it, it is missing",
            ),
            ({"model_type": "mistral"}, "model_type must be 'llama', as the recipe gives it, got 'mistral'"),
            ({"is_encoder_decoder": True}, "is_encoder_decoder must not be set, as the recipe gives none, got True"),
        ],
        ids=str,
    )
    def test_damaged_config(self, out: Path, keys: dict[str, Any], text: str) -> None:
        """None deletes a key."""
        self.edit_config(out, keys)
        (problem,) = verify(out).problems
        assert problem == Problem("inconsistent", "config.json", text)
        assert run(out).exit_code == 1
        self.edit_config(out, {"transformers_version": "4.50.0"})
        assert kinds(verify(out)) == {"inconsistent"}

    @staticmethod
    def edit_config(folder: Path, keys: dict[str, Any]) -> None:
        path = folder / "config.json"
        content = {**json.loads(path.read_text()), **keys}
        deleted = {key for key, value in keys.items() if value is None}
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in deleted}))

    @pytest.mark.parametrize(
        "keys",
        [
            {"_name_or_path": "x", "use_cache": False, "torch_dtype": "float16", "dtype": None},
            {"is_encoder_decoder": False},
            # As transformers 4 wrote it.
            {
                "transformers_version": "4.46.0",
                "dtype": None,
                "torch_dtype": "bfloat16",
                "head_dim": None,
                "rope_parameters": None,
                "rope_theta": 10000.0,
                "rope_scaling": None,
                "pretraining_tp": 1,
            },
        ],
        ids=str,
    )
    def test_config_that_says_the_same_otherwise(self, out: Path, keys: dict[str, Any]) -> None:
        self.edit_config(out, keys)
        assert verify(out).problems == ()

    def test_config_of_any_model_without_a_base(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        for number, name in enumerate("abc"):
            small_models.edit_json(root / name / "config.json", max_position_embeddings=32 << number)
        recipe = small_models.recipe(root, "linear", parameters={"weight": 1})
        del recipe["base_model"]
        out = small_models.merge(recipe, tmp_path / "out")
        assert verify(out).same
        for number in range(3):
            small_models.edit_json(out / "config.json", max_position_embeddings=32 << number)
            assert verify(out).same
        small_models.edit_json(out / "config.json", vocab_size=63)
        (problem,) = verify(out).problems
        assert problem.text == "vocab_size must be 64, as the recipe gives it, got 63"

    def test_size_of_an_aligned_vocabulary(self, tmp_path: Path) -> None:
        root = small_models.family(tokenizer=True)
        recipe = small_models.recipe(root, tokenizer={"source": "base", "pad_to_multiple_of": 48})
        out = small_models.merge(recipe, tmp_path / "out")
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 96
        assert verify(out).same
        small_models.edit_json(out / "config.json", vocab_size=64)
        (problem,) = verify(out).problems
        assert problem.text == "vocab_size must be 96, as the recipe gives it, got 64"

    def test_config_of_another_architecture(self, tmp_path: Path) -> None:
        root = tmp_path / "models"
        config = transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=64, architectures=["GPT2LMHeadModel"]
        )
        for name in ("base", "a", "b", "c"):
            transformers.GPT2LMHeadModel(config).save_pretrained(root / name)
        out = small_models.merge(small_models.recipe(root), tmp_path / "out")
        assert verify(out).same
        small_models.edit_json(out / "config.json", n_embd=32, n_layer=None)
        assert [problem.text for problem in verify(out).problems] == [
            "n_embd must be 16, as the recipe gives it, got 32",
            "n_layer must be 1, as the recipe gives it, got None",
        ]


class TestLocations:
    def test_moved_models(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        out = small_models.merge(small_models.recipe(root), tmp_path / "out")
        moved = root.rename(tmp_path / "elsewhere")
        assert run(out).exit_code == 2
        assert run(out, "--map", f"{root}={moved}").exit_code == 0
        one_by_one = [f"--map={root / name}={moved / name}" for name in ("base", "a", "b", "c")]
        assert run(out, *one_by_one).exit_code == 0
        swapped = [f"--map={root}={moved}", f"--map={root / 'a'}={moved / 'b'}", f"--map={root / 'b'}={moved / 'a'}"]
        assert run(out, *swapped).exit_code == 1

    def test_every_place_that_names_a_model(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yml"
        path.write_text(
            "merge_method: linear\nbase_model: o/x@v1\ndtype: float32\n"
            "slices: [{base_model: o/x, sources: [{model: o/x+o/lora, layer_range: [0, 2]}]}]\n"
            "tokenizer: {source: o/x, tokens: {t: {source: o/x}}}\n"
        )
        config = read_recipe(path)
        moved = relocated(config, {"o/x": "/n", "o/lora": "/l"}).model_dump(mode="json")
        assert "o/x" not in json.dumps(moved)
        assert moved["slices"][0]["sources"][0]["model"] == "/n+/l"
        assert str(config.base_model) == "o/x@v1"
        assert str(relocated(config, {"o": "/hub"}).base_model) == "/hub/x@v1"

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("nonsense", "must be OLD=NEW, got 'nonsense'"),
            ("=x", "must be OLD=NEW"),
            ("./no=./where", "--map must name a model of the recipe, got './no'"),
        ],
    )
    def test_map_that_fits_nothing(self, merged: Path, value: str, text: str) -> None:
        result = run(merged, "--map", value)
        assert result.exit_code == 2
        assert text in result.output


class TestDeterminism:
    def test_every_method_of_mergekit_and_ours_is_known(self) -> None:
        names = {method.spec.name for method in registered_methods()}
        known = {name for name in names if determinism(name) is not Determinism.UNKNOWN}
        assert known >= {name for name in names if not name.startswith("test_")}
        assert {name for name in names if determinism(name) is Determinism.RANDOM} == {
            "arcee_fusion",
            "dare_linear",
            "dare_ties",
            "della",
            "della_linear",
        }

    def test_random_method(self, tmp_path: Path) -> None:
        keys: dict[str, Any] = {"parameters": {"weight": 1, "density": 0.5}}
        recipe = small_models.recipe(small_models.family(), "dare_ties", **keys)
        out = small_models.merge(recipe, tmp_path / "out")
        answer = verify(out)
        assert answer.determinism is Determinism.RANDOM
        assert kinds(answer) == {"bits"}
        result = run(out)
        assert result.exit_code == 1
        assert "dare_ties draws at random" in result.output
        assert "UNDECIDED" in result.output

    def test_random_method_with_the_seed_of_the_merge(self, tmp_path: Path) -> None:
        keys: dict[str, Any] = {"parameters": {"weight": 1, "density": 0.5}}
        recipe = small_models.recipe(small_models.family(), "dare_ties", **keys)
        out = small_models.merge(recipe, tmp_path / "out", random_seed=3)
        state = torch.random.get_rng_state()
        assert verify(out, options=MergeOptions(random_seed=3)).same
        assert torch.equal(torch.random.get_rng_state(), state)
        assert run(out, "--random-seed", 3).exit_code == 0
        assert run(out, "--random-seed", 3, "--strict").exit_code == 1

    @pytest.mark.parametrize("tokenizer", [{"tokenizer": {"source": "union"}}, {"tokenizer_source": "union"}], ids=str)
    def test_union_of_vocabularies_in_another_order(self, tmp_path: Path, tokenizer: dict[str, Any]) -> None:
        root = small_models.family(tokenizer=True)
        out = small_models.merge(small_models.recipe(root, **tokenizer), tmp_path / "out")
        assert verify(out).same
        tensors = small_models.load(out)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name].flip(0).contiguous()
        small_models.save(out, tensors)
        answer = verify(out)
        assert (answer.same, answer.undecided) == (False, True)
        (note,) = answer.notes
        assert "PYTHONHASHSEED" not in note
        assert "one model, or base, as the tokenizer's source" in note
        result = run(out)
        assert result.exit_code == 1
        assert "UNDECIDED" in result.output
        tensors["model.norm.weight"] += 1
        small_models.save(out, tensors)
        assert not verify(out).undecided
        assert "NOT THE SAME" in run(out).output

    def test_order_of_a_vocabulary_that_is_no_union(self, tmp_path: Path) -> None:
        root = small_models.family(tokenizer=True)
        out = small_models.merge(small_models.recipe(root, tokenizer={"source": "base"}), tmp_path / "out")
        tensors = small_models.load(out)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
        small_models.save(out, tensors)
        assert (verify(out).undecided, verify(out).notes) == (False, ())

    def test_unknown_method(self, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mergekit_select.verification._EXACT", frozenset())
        answer = verify(merged)
        assert answer.determinism is Determinism.UNKNOWN
        assert answer.same
        assert "is not known here" in answer.notes[0]


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"", "holds nothing"),
            (b"\x00\xff\xfe\x80", "is not text"),
            (b"\x89PNG\r\n\x1a\n", "is not text"),
            (b"a: [", "is not YAML"),
            (b"- 1\n- 2\n", "holds a list"),
            (b"just words", "holds a str"),
            (b"merge_method: linear\n", "Exactly one of"),
            (b"merge_method: linear\nmodels: 3\n", "models: Input should be a valid list"),
            (b"[" * 1500, "is not YAML"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_recipe(self, out: Path, content: bytes, text: str) -> None:
        (out / "mergekit_config.yml").write_bytes(content)
        self.one_line(run(out), text)

    @staticmethod
    def one_line(result: Result, text: str) -> None:
        assert result.exit_code == 2, result.output
        assert text in result.output
        assert len(result.output.strip().splitlines()) == 1
        assert result.output.startswith("Error: ")

    def test_unknown_method(self, out: Path) -> None:
        path = out / "mergekit_config.yml"
        path.write_text(path.read_text().replace("parameter_selection_resampling", "no_such_method"))
        self.one_line(run(out), "Unimplemented merge method no_such_method")
        with pytest.raises(ReplayError):
            verify(out)

    def test_parameter_that_breaks_its_rule(self, out: Path) -> None:
        path = out / "mergekit_config.yml"
        path.write_text(path.read_text() + "parameters: {seed: -1}\n")
        self.one_line(run(out), "seed must be an integer in [0, 2^63)")

    def test_no_folder(self, tmp_path: Path) -> None:
        self.one_line(run(tmp_path / "none"), "cannot read the output folder")
        (tmp_path / "file").write_text("x")
        self.one_line(run(tmp_path / "file"), "Not a directory")
        (tmp_path / "empty").mkdir()
        self.one_line(run(tmp_path / "empty"), "holds nothing that a merge writes")

    def test_recipe_that_is_missing_or_a_folder(self, out: Path, tmp_path: Path) -> None:
        self.one_line(run(out, "--recipe", tmp_path / "none.yml"), "No such file")
        self.one_line(run(out, "--recipe", tmp_path), "Is a directory")

    @pytest.mark.parametrize("file", ["model.safetensors", "mergekit_config.yml", "config.json", "."])
    def test_no_permission(self, out: Path, file: str) -> None:
        mode = (out / file).stat().st_mode
        (out / file).chmod(0)
        try:
            if os.access(out / file, os.R_OK):
                pytest.skip("root may read everything")
            self.one_line(run(out), "Permission denied")
        finally:
            (out / file).chmod(mode)

    @pytest.mark.parametrize("keep", [0, 4, 100, 5000])
    def test_truncated_weights(self, out: Path, keep: int) -> None:
        path = out / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.one_line(run(out), "model.safetensors is no whole safetensors file")

    def test_header_that_lies_about_sizes(self, out: Path) -> None:
        path = out / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
        self.one_line(run(out), "is no whole safetensors file")
        path.write_bytes(content.replace(b'"shape":[32]', b'"shape":[99]'))
        self.one_line(run(out), "is no whole safetensors file")

    def test_damaged_pickle(self, tmp_path: Path) -> None:
        recipe = small_models.recipe(small_models.family())
        out = small_models.merge(recipe, tmp_path / "out", safe_serialization=False)
        (out / "pytorch_model.bin").write_bytes(b"no pickle")
        self.one_line(run(out), "cannot read")

    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
    def test_damaged_json(self, shards: Path, content: bytes) -> None:
        index = shards / "model.safetensors.index.json"
        before = index.read_bytes()
        index.write_bytes(content)
        self.one_line(run(shards), "model.safetensors.index.json")
        index.write_bytes(before)
        (shards / "config.json").write_bytes(content)
        self.one_line(run(shards), "config.json")

    @pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}], ids=str)
    def test_index_of_another_shape(self, shards: Path, index: dict[str, Any]) -> None:
        (shards / "model.safetensors.index.json").write_text(json.dumps(index))
        self.one_line(run(shards), "must map tensor names to files")

    def test_models_that_cannot_be_read(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        out = small_models.merge(small_models.recipe(root), tmp_path / "out")
        weights = root / "a" / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-7])
        self.one_line(run(out), str(weights))
        weights.unlink()
        self.one_line(run(out), str(root / "a"))
        index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
        (root / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
        self.one_line(run(out), "gone.safetensors")
        shutil.rmtree(root / "a")
        self.one_line(run(out), "there is no folder")

    def test_model_that_lacks_a_tensor(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        out = small_models.merge(small_models.recipe(root), tmp_path / "out")
        tensors = small_models.load(root / "b")
        del tensors["model.norm.weight"]
        small_models.save(root / "b", tensors)
        self.one_line(run(out), "tensor 'model.norm.weight'")

    def test_nothing_is_modified(self, out: Path) -> None:
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
        run(out, "--json")
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before


class TestCommand:
    def test_text(self, merged: Path) -> None:
        result = run(merged)
        assert result.exit_code == 0
        assert result.output == (
            f"SAME: every bit of {merged} is what its recipe gives; "
            "21 tensors with 19,616 parameters compared (parameter_selection_resampling)\n"
        )

    def test_json(self, out: Path) -> None:
        tensors = small_models.load(out)
        tensors["model.norm.weight"] += 1
        small_models.save(out, tensors)
        result = run(out, "--json")
        content = json.loads(result.output)
        assert (content["schema"], content["command"], content["ok"]) == (1, "verify", False)
        assert content["tensors"] == TENSORS
        assert content["determinism"] == "exact"
        assert content["differences"][0]["index"] == [0]
        assert result.exit_code == 1

    def test_many_differences_are_cut_off(self, out: Path) -> None:
        small_models.save(out, {name: value + 1 for name, value in small_models.load(out).items()})
        lines = run(out).output.splitlines()
        assert len(lines) == 22
        assert lines[-2] == "and 1 more; --json lists all"

    def test_real_process_and_full_disk(self, merged: Path) -> None:
        program = [sys.executable, "-m", "mergekit_select.cli", "verify", str(merged)]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("SAME: ")
        if not Path("/dev/full").exists():
            return
        with open("/dev/full", "w") as full:
            done = subprocess.run([*program, "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == "Error: cannot write the report to stdout: No space left on device\n"

    def test_errors_are_of_one_family(self) -> None:
        assert issubclass(UnreadableError, MergekitSelectError)
        assert issubclass(ReplayError, MergekitSelectError)
