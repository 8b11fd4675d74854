from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

import small_models
from mergekit_select.errors import ParameterError
from mergekit_select.inspection import Inspection, inspect, place
from mergekit_select.inspection_cli import inspect_command
from mergekit_select.replay import UnreadableError
from mergekit_select.tally import Tally, empty

PARAMETERS = 19_616
RESAMPLING = "parameter_selection_resampling"


def inspected(recipe: Mapping[str, Any]) -> Inspection:
    return inspect(MergeConfiguration.model_validate(recipe))


def run(recipe: Mapping[str, Any] | bytes, folder: Path, *arguments: str) -> Result:
    path = folder / "recipe.yml"
    path.write_bytes(recipe if isinstance(recipe, bytes) else yaml.safe_dump(dict(recipe)).encode())
    result = CliRunner().invoke(inspect_command, [str(path), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((bits(a) == bits(b)).sum())


@pytest.fixture(scope="module")
def distinct() -> Path:
    """A family in float32: two values that both moved are practically never equal."""
    return small_models.family(torch.float32)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, distinct: Path) -> Path:
    """A family without a parameter that two models share, so that an output tells where each is from."""
    root = small_models.copied(distinct, tmp_path_factory.mktemp("models") / "models")
    torch.manual_seed(1)
    for name in "abc":
        tensors = {key: torch.randn(value.shape) for key, value in small_models.load(root / name).items()}
        small_models.save(root / name, tensors)
    return root


def places(answer: Inspection) -> Iterator[tuple[Tally, list[str]]]:
    """Every grouping: its tally, and the names of its tensors."""
    yield answer.total, [tensor.name for tensor in answer.tensors]
    for layer, tally in answer.layers.items():
        yield tally, [tensor.name for tensor in answer.tensors if tensor.layer == layer]
    for module, tally in answer.modules.items():
        yield tally, [tensor.name for tensor in answer.tensors if tensor.module == module]
    for tensor in answer.tensors:
        yield tensor.tally, [tensor.name]


class TestCountsOfAMergedOutput:
    @pytest.mark.parametrize(
        "parameters",
        [
            {},
            {"seed": 7},
            {"weight": [{"filter": "self_attn", "value": 2}, {"value": [1, 3]}]},
        ],
        ids=str,
    )
    def test_selection(self, moved: Path, tmp_path: Path, parameters: dict[str, Any]) -> None:
        models = [{"model": str(moved / name)} for name in "abc"]
        models[1]["parameters"] = parameters  # type: ignore[assignment]
        recipe = {"merge_method": "parameter_selection", "models": models, "parameters": {}}
        if "seed" in parameters:
            recipe["parameters"] = models[1].pop("parameters")
        merged = small_models.load(small_models.merge(recipe, tmp_path / "out"))
        inputs = [small_models.load(moved / name) for name in "abc"]
        answer = inspected(recipe)
        assert (answer.draws, answer.resamples, answer.seed) == (True, False, parameters.get("seed", 0))
        for tally, names in places(answer):
            counts = tuple(sum(same(merged[name], tensors[name]) for name in names) for tensors in inputs)
            assert tally.chosen == tally.first == counts
            assert sum(counts) == tally.parameters == tally.drawn
            assert (tally.left, tally.redrawn) == (0, (0, 0, 0))

    @pytest.mark.parametrize("rounds", [None, 1, 2])
    def test_resampling(self, distinct: Path, tmp_path: Path, rounds: int | None) -> None:
        parameters = {"seed": 3} if rounds is None else {"seed": 3, "rounds": rounds}
        recipe = small_models.recipe(distinct, parameters=parameters)
        merged = small_models.load(small_models.merge(recipe, tmp_path / "out"))
        first = small_models.recipe(distinct, "parameter_selection", parameters={"seed": 3})
        selected = small_models.load(small_models.merge(first, tmp_path / "first"))
        base = small_models.load(distinct / "base")
        inputs = [small_models.load(distinct / name) for name in "abc"]
        answer = inspected(recipe)
        assert (answer.resamples, answer.rounds) == (True, rounds)
        for tally, names in places(answer):
            for k, tensors in enumerate(inputs):
                changed = {name: bits(tensors[name]) != bits(base[name]) for name in names}
                assert tally.unchanged[k] == sum(int((~changed[name]).sum()) for name in names)
                assert tally.chosen[k] == sum(
                    same(merged[name][changed[name]], tensors[name][changed[name]]) for name in names
                )
            assert tally.left == sum(same(merged[name], base[name]) for name in names)
            assert sum(tally.redrawn) == sum(same(selected[name], base[name]) for name in names)
            assert sum(tally.first) == sum(tally.chosen) + tally.left == tally.drawn
        assert answer.total.first == inspected(first).total.first

    def test_aligned_vocabulary(self, tmp_path: Path) -> None:
        root = small_models.family(torch.float32, tokenizer=True)
        recipe = small_models.recipe(root, tokenizer={"source": "base"})
        merged = small_models.load(small_models.merge(recipe, tmp_path / "out"))
        answer = inspected(recipe)
        name = "model.embed_tokens.weight"
        (tally,) = (tensor.tally for tensor in answer.tensors if tensor.name == name)
        # Each sub-model's tokens are rotated against the base's, so that hardly a row stays where it was.
        assert sum(tally.unchanged) < sum(
            tensor.tally.unchanged[k]
            for k in range(3)
            for tensor in inspected(small_models.recipe(root)).tensors
            if tensor.name == name
        )
        base = small_models.load(root / "base")[name]
        assert tally.left == same(merged[name], base[: len(merged[name])])

    def test_slices_that_list_the_models_in_another_order(self, moved: Path, tmp_path: Path) -> None:
        def part(names: str, layers: list[int], weights: list[int]) -> dict[str, Any]:
            sources = [
                {"model": str(moved / name), "layer_range": layers, "parameters": {"weight": weight}}
                for name, weight in zip(names, weights, strict=True)
            ]
            return {"sources": sources}

        slices = [part("ab", [0, 1], [1, 3]), part("cba", [1, 2], [1, 2, 5])]
        recipe = {"merge_method": "parameter_selection", "slices": slices}
        merged = small_models.load(small_models.merge(recipe, tmp_path / "out"))
        answer = inspected(recipe)
        names = [Path(model).name for model in answer.models]
        assert sorted(names) == ["a", "b", "c"]
        for tensor in answer.tensors:
            counts = [same(merged[tensor.name], small_models.load(moved / name)[tensor.name]) for name in names]
            assert tensor.tally.chosen == tuple(counts)
        second = answer.layers["model.layers.1"]
        shares = dict(zip(names, (value / second.drawn for value in second.expected), strict=True))
        assert shares == pytest.approx({"a": 5 / 8, "b": 2 / 8, "c": 1 / 8})
        deviations = [value for value in answer.total.deviations if value is not None]
        assert max(map(abs, deviations)) < 4

    def test_tensor_that_one_model_has(self, moved: Path, tmp_path: Path) -> None:
        """In an architecture that mergekit infers, a tensor may be missing somewhere."""
        root = small_models.copied(moved, tmp_path / "models")
        for name in ("base", "a", "b", "c"):
            small_models.edit_json(root / name / "config.json", architectures=["NobodyKnowsForCausalLM"])
        for name in "ab":
            tensors = small_models.load(root / name)
            del tensors["model.norm.weight"]
            if name == "a":
                del tensors["model.layers.1.mlp.up_proj.weight"]
            small_models.save(root / name, tensors)
        recipe = {
            "merge_method": "parameter_selection",
            "models": [{"model": str(root / name)} for name in "abc"],
        }
        merged = small_models.load(small_models.merge(recipe, tmp_path / "out"))
        tallies = {tensor.name: tensor.tally for tensor in inspected(recipe).tensors}
        assert tallies.keys() == merged.keys()
        norm = tallies["model.norm.weight"]
        assert (norm.drawn, norm.held, norm.chosen) == (0, (0, 0, 32), (0, 0, 0))
        projection = tallies["model.layers.1.mlp.up_proj.weight"]
        assert (projection.held, projection.drawn) == ((0, 1536, 1536), 1536)
        for k, name in enumerate("abc"):
            held = small_models.load(root / name).get("model.layers.1.mlp.up_proj.weight")
            counted = 0 if held is None else same(held, merged["model.layers.1.mlp.up_proj.weight"])
            assert projection.chosen[k] == counted
        assert "copied without a draw: 32 parameters" in run(recipe, tmp_path).output


class TestComparison:
    def test_norms_agreement_and_what_no_sub_model_changed(self) -> None:
        root = small_models.family()
        base = small_models.load(root / "base")
        inputs = [small_models.load(root / name) for name in "abc"]
        for tally, names in places(inspected(small_models.recipe(root))):
            for k, tensors in enumerate(inputs):
                square = sum(((tensors[n].double() - base[n].double()) ** 2).sum().item() for n in names)
                assert tally.norms[k] == pytest.approx(square**0.5, rel=1e-12)
                origin = sum((base[n].double() ** 2).sum().item() for n in names)
                assert tally.relative_norms[k] == pytest.approx((square / origin) ** 0.5, rel=1e-12)
            for pair, (i, j) in enumerate(combinations(range(3), 2)):
                assert tally.pairs_agreeing[pair] == sum(same(inputs[i][n], inputs[j][n]) for n in names)
            everywhere = 0
            for name in names:
                equal = torch.ones(base[name].shape, dtype=torch.bool)
                for tensors in inputs:
                    equal &= bits(tensors[name]) == bits(base[name])
                everywhere += int(equal.sum())
            assert tally.unchanged_all == everywhere

    @pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
    def test_other_methods(self, method: str, tmp_path: Path) -> None:
        root = small_models.family()
        recipe = small_models.recipe(root, method, parameters={"weight": 1})
        if method == "passthrough":
            recipe = {"merge_method": method, "models": [{"model": str(root / "a")}]}
        answer = inspected(recipe)
        assert (answer.draws, answer.seed, answer.total.drawn) == (False, None, 0)
        assert answer.total.parameters == PARAMETERS
        if method != "passthrough":
            assert answer.total.unchanged == inspected(small_models.recipe(root)).total.unchanged
        output = run(recipe, tmp_path).output
        assert "chosen" not in output
        assert ("unchanged" in output) == (method != "passthrough")

    def test_without_a_base(self, tmp_path: Path) -> None:
        recipe = small_models.recipe(small_models.family(), "parameter_selection")
        del recipe["base_model"]
        answer = inspected(recipe)
        assert answer.bases == ()
        assert answer.total.unchanged_shares == answer.total.norms == (None, None, None)
        result = run(recipe, tmp_path)
        assert "base none" in result.output
        assert "unchanged" not in result.output
        assert "chosen" in result.output
        assert run(recipe, tmp_path, "--json").exit_code == 0

    def test_mixed_dtypes_are_compared_as_they_are_merged(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        before = inspected(small_models.recipe(root)).total
        for name in ("base", "c"):
            tensors = {key: value.float() for key, value in small_models.load(root / name).items()}
            small_models.save(root / name, tensors)
        assert inspected(small_models.recipe(root)).total == before

    def test_more_sub_models_than_are_compared_pairwise(self, tmp_path: Path) -> None:
        root = small_models.family()
        copies = [small_models.copied(root / "abc"[number % 3], tmp_path / f"m{number}") for number in range(17)]
        recipe = {**small_models.recipe(root), "models": [{"model": str(copy)} for copy in copies]}
        answer = inspected(recipe)
        assert answer.total.pairs_held == ()
        assert sum(answer.total.first) == PARAMETERS
        lines = run(recipe, tmp_path).output.splitlines()
        assert max(map(len, lines)) <= 100

    def test_nothing_is_kept_or_changed(self) -> None:
        LoaderCache.loaders.clear()
        config = MergeConfiguration.model_validate(small_models.recipe(small_models.family()))
        before = config.model_dump()
        inspect(config)
        assert config.model_dump() == before
        assert LoaderCache.loaders == {}

    def test_tallies_add_up(self) -> None:
        total = inspected(small_models.recipe(small_models.family())).total
        assert empty(3) + total == total
        assert (total + total).first == tuple(2 * count for count in total.first)


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "model.layers.12", "self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj.bias", "model.layers.0", "self_attn.q_proj.bias"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", "model.layers.3", "mlp.experts.*.up_proj"),
        ("h.7.attn.c_attn.weight", "h.7", "attn.c_attn"),
        ("0.weight", "0", "weight"),
        ("bert.encoder.layer.1.attention.self.query.weight", "bert.encoder.layer.1", "attention.self.query"),
        ("model.embed_tokens.weight", None, "embed_tokens"),
        ("model.norm.weight", None, "norm"),
        ("lm_head.weight", None, "lm_head"),
        ("weight", None, "weight"),
    ],
)
def test_place(name: str, layer: str | None, module: str) -> None:
    assert place(name) == (layer, module)


class TestCommand:
    def test_text(self, tmp_path: Path) -> None:
        result = run(small_models.recipe(small_models.family(), parameters={"rounds": 1}), tmp_path)
        assert result.exit_code == 0
        assert "parameter_selection_resampling, seed 0, rounds 1" in result.output
        assert "21 tensors, 19,616 parameters, 3 sub-models" in result.output
        lines = result.output.splitlines()
        assert max(map(len, lines)) <= 100
        for start in ("1 ", "left at the base", "layer ", "outside the layers", "self_attn.q_proj ", "norm "):
            assert any(line.startswith(start) for line in lines), start

    def test_long_names_keep_their_end(self, tmp_path: Path) -> None:
        folder = tmp_path / ("very" * 20) / ("long" * 20)
        folder.parent.mkdir()
        root = small_models.copied(small_models.family(), folder)
        lines = run(small_models.recipe(root), tmp_path).output.splitlines()
        table = [line for line in lines if "%" in line and "unchanged in every" not in line]
        assert max(map(len, table)) <= 100
        assert any(line.startswith("1 …") and "long/a " in line for line in table)

    def test_json(self, tmp_path: Path) -> None:
        result = run(small_models.recipe(small_models.family()), tmp_path, "--json")
        content = json.loads(result.output)
        assert (content["schema"], content["command"], content["method"]) == (1, "inspect", RESAMPLING)
        assert content["pairs"] == [[0, 1], [0, 2], [1, 2]]
        assert len(content["tensors"]) == content["total"]["counts"]["tensors"] == 21
        assert [group["layer"] for group in content["layers"]] == ["model.layers.0", "model.layers.1", None]
        shares = content["total"]["shares"]
        assert sum(shares["chosen"]) + shares["left"] == pytest.approx(1)
        assert shares["expected"] == pytest.approx([1 / 3] * 3)

    def test_values_that_json_lacks(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        tensors = small_models.load(root / "a")
        tensors["model.norm.weight"][0] = float("nan")
        small_models.save(root / "a", tensors)
        recipe = small_models.recipe(root)
        content = json.loads(run(recipe, tmp_path, "--json").output)
        assert content["total"]["norms"]["task_vector"][0] is None
        assert "nan" in run(recipe, tmp_path).output

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
    def test_real_process_on_a_full_disk(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(small_models.recipe(small_models.family())))
        program = [sys.executable, "-m", "mergekit_select.cli", "inspect", str(path)]
        with open("/dev/full", "w") as full:
            done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == "Error: cannot write the report to stdout: No space left on device\n"


class TestPlot:
    @pytest.mark.parametrize(
        ("method", "suffix", "magic"),
        [
            (RESAMPLING, "png", b"\x89PNG"),
            (RESAMPLING, "svg", b"<?xml"),
            ("parameter_selection", "PDF", b"%PDF"),
            ("linear", "png", b"\x89PNG"),
        ],
    )
    def test_file(self, tmp_path: Path, method: str, suffix: str, magic: bytes) -> None:
        pytest.importorskip("matplotlib")
        recipe = small_models.recipe(small_models.family(), method, parameters={"weight": 1})
        path = tmp_path / f"picture.{suffix}"
        assert run(recipe, tmp_path, "--plot", str(path)).exit_code == 0
        assert path.read_bytes().startswith(magic)
        if suffix == "svg":
            text = path.read_text()
            for words in ("left at the base", "self_attn.q_proj", "layer", "kind of module"):
                assert f"<!-- {words}" in text

    def test_many_layers_stand_side_by_side(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        recipe = small_models.recipe(small_models.family(layers=18))
        path = tmp_path / "picture.png"
        assert run(recipe, tmp_path, "--plot", str(path)).exit_code == 0
        width, height = (int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20))
        assert width > 2 * height

    def test_without_a_base_or_layers_that_agree(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        root = small_models.family()
        recipe = {"merge_method": "passthrough", "models": [{"model": str(root / "a")}]}
        assert run(recipe, tmp_path, "--plot", str(tmp_path / "p.png")).exit_code == 0

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("picture.txt", "--plot must name a file that ends in .png, .svg or .pdf"),
            ("picture", "--plot must name a file that ends in"),
            ("no/folder.png", "--plot must name a file in a folder that is there"),
        ],
    )
    def test_name_that_cannot_be_written(self, tmp_path: Path, name: str, text: str) -> None:
        pytest.importorskip("matplotlib")
        result = run(small_models.recipe(small_models.family()), tmp_path, "--plot", str(tmp_path / name))
        assert result.exit_code == 2
        assert text in result.output
        assert len(result.output.splitlines()) == 1

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
    def test_full_disk(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        (tmp_path / "full.png").symlink_to("/dev/full")
        recipe = small_models.recipe(small_models.family())
        result = run(recipe, tmp_path, "--plot", str(tmp_path / "full.png"))
        assert result.exit_code == 2
        assert "cannot write the picture" in result.output
        assert "No space left on device" in result.output
        assert len(result.output.splitlines()) == 1

    def test_matplotlib_is_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mergekit_select.inspection_plot.installed", lambda: False)
        recipe = small_models.recipe(small_models.family())
        result = run(recipe, tmp_path, "--plot", str(tmp_path / "p.png"))
        assert result.exit_code == 2
        assert result.output == (
            "Error: --plot needs matplotlib; install it with: pip install 'mergekit-select[plot]'\n"
        )


class TestBadInput:
    @staticmethod
    def one_line(result: Result, code: int, text: str) -> None:
        assert result.exit_code == code, result.output
        assert text in result.output
        assert len(result.output.splitlines()) == 1

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"", "holds nothing"),
            (b"\x00\x01\xff", "is not text"),
            (b"a: [", "is not YAML"),
            (b"7", "holds a int"),
            (b"merge_method: linear", "is no recipe"),
            (b"a: 1\n---\nb: 2\n", "must hold one YAML document"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_recipe(self, tmp_path: Path, content: bytes, text: str) -> None:
        self.one_line(run(content, tmp_path), 2, text)

    def test_no_recipe(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(inspect_command, [str(tmp_path / "none.yml")])
        self.one_line(result, 2, "No such file or directory")

    def test_models_that_are_missing_or_damaged(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        recipe = small_models.recipe(root)
        path = root / "b" / "model.safetensors"
        content = path.read_bytes()
        for damaged in (b"", content[:-1], (1 << 50).to_bytes(8, "little") + content[8:]):
            path.write_bytes(damaged)
            self.one_line(run(recipe, tmp_path), 2, str(path))
        path.unlink()
        self.one_line(run(recipe, tmp_path), 2, str(root / "b"))
        (root / "b" / "config.json").write_text("{")
        self.one_line(run(recipe, tmp_path), 2, str(root / "b"))
        with pytest.raises(UnreadableError):
            inspected({**recipe, "models": [{"model": str(tmp_path / "gone")}]})

    def test_recipe_that_does_not_merge(self, tmp_path: Path) -> None:
        recipe = small_models.recipe(small_models.family())
        self.one_line(run({**recipe, "merge_method": "nonsense"}, tmp_path), 1, "Unimplemented merge method")
        self.one_line(run({**recipe, "parameters": {"rounds": 0}}, tmp_path), 1, "rounds must be an integer")
        del recipe["base_model"]
        self.one_line(run(recipe, tmp_path), 1, "requires a base")

    def test_weights_that_are_all_0_for_some_tensor(self, tmp_path: Path) -> None:
        recipe = small_models.recipe(small_models.family())
        recipe["parameters"] = {"weight": [{"filter": "layers.1.mlp.up_proj", "value": 0}, {"value": 1}]}
        self.one_line(run(recipe, tmp_path), 1, "tensor 'model.layers.1.mlp.up_proj.weight': the weights")
        with pytest.raises(ParameterError):
            inspected(recipe)

    def test_shapes_that_differ(self, tmp_path: Path) -> None:
        root = small_models.copied(small_models.family(), tmp_path / "models")
        tensors = small_models.load(root / "c")
        tensors["model.norm.weight"] = torch.zeros(33, dtype=torch.bfloat16)
        small_models.save(root / "c", tensors)
        self.one_line(run(small_models.recipe(root), tmp_path), 1, "size mismatch for model.norm.weight")
