"""The methods through each of mergekit's commands and interfaces, and under the options that change how they run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from safetensors.torch import save_file

from tests.compatibility import UP_TO_PYTHON_312, shows
from tests.support import expectation
from tests.support.checkpoints import VOCABULARY, Tensors, copied, tensors_of, without
from tests.support.commands import run, run_here
from tests.support.models import Family
from tests.support.recipes import METHODS, SELECTION, Recipe, merge, recipe, written
from tests.support.stored import filled, read_all, rows_of, stored, wanted

HEAD = ["lm_head.weight"]
both_methods = pytest.mark.parametrize("method", METHODS)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def sharded_small(out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3


OPTIONS: dict[str, Callable[[Path], None]] = {
    "": lambda out: None,
    "--async-write": lambda out: None,
    "--async-write --out-shard-size 4K": sharded_small,
    "--out-shard-size 4K": sharded_small,
    "--clone-tensors": lambda out: None,
    "--random-seed 3": lambda out: None,
    "--no-copy-tokenizer": lambda out: not_there(out, "tokenizer.json"),
    "--no-write-model-card": lambda out: not_there(out, "README.md", "mergekit_config.yml"),
}


def not_there(out: Path, *files: str) -> None:
    assert not names_in(out) & set(files)


@shows("Commands and options", lambda options: f"`mergekit-yaml {options}`".replace(" `", "`"))
@both_methods
@pytest.mark.parametrize("options", OPTIONS)
def test_mergekit_yaml_with_options(llamas: Family, tmp_path: Path, method: str, options: str) -> None:
    file = written(tmp_path / "recipe.yml", llamas.recipe(method))
    run_here("mergekit-yaml", file, tmp_path / "out", "--quiet", *options.split())
    out = tmp_path / "out"
    expectation.assert_same(expectation.read(out), wanted(method, llamas.base, llamas.subs))
    OPTIONS[options](out)
    if "copy-tokenizer" not in options:
        assert (out / "tokenizer.json").read_bytes() == (llamas.base / "tokenizer.json").read_bytes()


@shows("Commands and options", "`mergekit-yaml --no-safe-serialization`", note="the output is a `.bin` file")
@both_methods
def test_mergekit_yaml_writing_a_pickled_checkpoint(llamas: Family, tmp_path: Path, method: str) -> None:
    file = written(tmp_path / "recipe.yml", llamas.recipe(method))
    run_here("mergekit-yaml", file, tmp_path / "out", "--quiet", "--no-safe-serialization")
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    expectation.assert_same(
        {name: stored(tensor) for name, tensor in found.items()}, wanted(method, llamas.base, llamas.subs)
    )


@shows("Commands and options", "`mergekit-yaml --unsafe-truncate-embeddings`", note="the smallest vocabulary's rows")
@both_methods
def test_mergekit_yaml_truncating_embeddings(llamas: Family, tmp_path: Path, method: str) -> None:
    def padded(tensors: Tensors) -> None:
        tensors.update({name: torch.cat([tensors[name], tensors[name][:32]]) for name in VOCABULARY})

    subs = [copied(llamas.subs[0], tmp_path / "padded", padded), *llamas.subs[1:]]
    file = written(tmp_path / "recipe.yml", recipe(method, llamas.base, subs))
    run_here("mergekit-yaml", file, tmp_path / "out", "--quiet", "--unsafe-truncate-embeddings")
    base, *tensors = read_all(llamas.base, *subs)
    tensors[0] |= {name: rows_of(tensors[0][name], list(range(96))) for name in VOCABULARY}
    expectation.assert_same(expectation.read(tmp_path / "out"), wanted(method, base, tensors))


@shows("Commands and options", lambda options: f"`mergekit-yaml {options}`")
@both_methods
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=needs_gpu)
        for options in ("--cuda", "--cuda --low-cpu-memory", "--cuda --read-to-gpu", "--multi-gpu", "--gpu-rich")
    ],
)
def test_mergekit_yaml_on_a_gpu(llamas: Family, tmp_path: Path, method: str, options: str) -> None:
    file = written(tmp_path / "recipe.yml", llamas.recipe(method))
    run_here("mergekit-yaml", file, tmp_path / "out", "--quiet", *options.split())
    expectation.assert_same(expectation.read(tmp_path / "out"), wanted(method, llamas.base, llamas.subs))


def two_stages(method: str, base: Path, subs: list[Path]) -> list[Recipe]:
    """Select within each task's runs, then `ties` across the tasks."""
    tasks = {"first-task": subs[:2], "second-task": subs[1:]}
    stages = [recipe(method, base, runs, name=name) for name, runs in tasks.items()]
    settings = [{"weight": 1.0, "density": 0.5}] * 2
    return [*stages, recipe("ties", base, tasks, model_parameters=settings)]


@shows("Commands and options", "`mergekit-multi`: selection within each task's runs, then `ties` across tasks")
@both_methods
def test_mergekit_multi_in_two_stages(llamas: Family, tmp_path: Path, method: str) -> None:
    *_, last = stages = two_stages(method, llamas.base, llamas.subs)
    file = written(tmp_path / "recipe.yml", *stages)
    arguments = [file, "--intermediate-dir", tmp_path / "stages", "--out-path", tmp_path / "out", "--quiet"]
    if method == SELECTION:
        done = run("mergekit-multi", *arguments)
        assert done.returncode == 0, done.stderr
    else:
        run_here("mergekit-multi", *arguments)

    by_hand = []
    for name, runs in (("first-task", llamas.subs[:2]), ("second-task", llamas.subs[1:])):
        tensors = wanted(method, llamas.base, runs)
        expectation.assert_same(expectation.read(tmp_path / "stages" / name), tensors)
        by_hand.append(filled(runs[0], tmp_path / f"by-hand-{name}", tensors))
    last["models"] = [entry | {"model": str(folder)} for entry, folder in zip(last["models"], by_hand, strict=True)]
    ties = merge(last, tmp_path / "ties")
    expectation.assert_same(expectation.read(tmp_path / "out"), expectation.read(ties))


@shows(
    "Commands and options",
    "`mergekit-multi` with a stage called like its method",
    gap=True,
    note="mergekit takes the method's name for that stage's: “Circular dependency”; call it otherwise",
)
def test_mergekit_multi_refuses_a_stage_called_like_its_method(llamas: Family, tmp_path: Path) -> None:
    for method in [*METHODS, "linear"]:
        stage = llamas.recipe(method, name=method, parameters={"weight": 1.0})
        file = written(tmp_path / f"{method}.yml", stage)
        with pytest.raises(ValueError, match=f"^Circular dependency detected involving {method}$"):
            run_here("mergekit-multi", file, "-I", tmp_path / "stages", "--quiet")


def raw_files(folders: list[Path], to: Path, suffix: str, nested: bool = False) -> list[Path]:
    """The tensors of checkpoints, each as one file and nothing else."""
    files = []
    for folder in folders:
        files.append(to / f"{folder.name}{suffix}")
        tensors = tensors_of(folder)
        if suffix == ".pt":
            torch.save({"state_dict": tensors} if nested else tensors, files[-1])
        else:
            save_file(tensors, files[-1])
    return files


@shows(
    "Commands and options",
    lambda raw: f"`mergekit-pytorch` on raw files: `{raw}`".replace(" --", "` with `--"),
    note=lambda raw: UP_TO_PYTHON_312 if "--lazy-unpickle" in raw else "",
)
@both_methods
@pytest.mark.parametrize("raw", [".safetensors", ".pt", ".pt --lazy-unpickle"])
def test_mergekit_pytorch_on_raw_files(llamas: Family, tmp_path: Path, method: str, raw: str) -> None:
    suffix, *options = raw.split()
    files = raw_files(llamas.everyone, tmp_path, suffix)
    config = recipe(method, files[0], files[1:], parameters={"seed": 3})
    if options and sys.version_info >= (3, 13):
        linear = recipe("linear", None, files, parameters={"weight": 1.0})
        for each in (config, linear):
            with pytest.raises(AttributeError, match="'execute'"):
                run_here("mergekit-pytorch", written(tmp_path / "raw.yml", each), tmp_path / "out", *options)
        return
    run_here("mergekit-pytorch", written(tmp_path / "raw.yml", config), tmp_path / "out", "--quiet", *options)
    found = expectation.read(tmp_path / "out")
    expectation.assert_same(found, wanted(method, llamas.base, llamas.subs, seed=3))


@shows(
    "Commands and options",
    "`mergekit-pytorch` on `.pt` files with the tensors under `state_dict`",
    gap=True,
    note="mergekit lists the tensors and then does not find them",
)
def test_mergekit_pytorch_cannot_read_nested_files(llamas: Family, tmp_path: Path) -> None:
    files = raw_files(llamas.everyone, tmp_path, ".pt", nested=True)
    for method in [*METHODS, "linear"]:
        config = written(tmp_path / "raw.yml", recipe(method, files[0], files[1:], parameters={"weight": 1.0}))
        with pytest.raises(KeyError, match="weight"):
            run_here("mergekit-pytorch", config, tmp_path / method, "--quiet")


@shows(
    "Commands and options",
    lambda option: f"`mergekit-pytorch {option}`, with a tensor that one file lacks",
    note=lambda option: "drawn among those that have it" if option == "--tensor-union" else "left out",
)
@both_methods
@pytest.mark.parametrize("option", ["--tensor-union", "--tensor-intersection"])
def test_mergekit_pytorch_with_a_tensor_that_one_lacks(
    llamas: Family, tmp_path: Path, method: str, option: str
) -> None:
    lacking = copied(llamas.subs[1], tmp_path / "lacking", without(*HEAD))
    folders = [llamas.base, llamas.subs[0], lacking, llamas.subs[2]]
    files = [folder / "model.safetensors" for folder in folders]
    config = recipe(method, files[0], files[1:])
    run_here("mergekit-pytorch", written(tmp_path / "raw.yml", config), tmp_path / "out", option, "--quiet")
    result = wanted(method, llamas.base, llamas.subs)
    head = {name: [{name: tensors[name]} for tensors in read_all(*folders) if name in tensors] for name in HEAD}
    for name, (base, *subs) in head.items():
        result |= wanted(method, base, subs)
        if option == "--tensor-intersection":
            result.pop(name)
    expectation.assert_same(expectation.read(tmp_path / "out"), result)


class Small(torch.nn.Module):
    """Something that is no language model: a convolution, a norm with buffers, tied layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = torch.nn.Conv2d(2, 3, 3)
            self.norm = torch.nn.BatchNorm1d(5)
            self.norm.register_buffer("running_mean", torch.rand(5))
            self.tied = self.inner


@shows(
    "Commands and options",
    "`merge_state_dicts` on modules and on state dicts",
    note="results carry no autograd history; buffers of integers are copied where all agree; tied ones stay tied",
)
@both_methods
@pytest.mark.parametrize("of", ["modules", "state dicts"])
def test_merge_state_dicts(method: str, of: str) -> None:
    modules = {name: Small(k) for k, name in enumerate(["base", "a", "b", "c"])}
    states = {name: module.state_dict() for name, module in modules.items()}
    given: Any = modules if of == "modules" else states
    found = merge_state_dicts(
        given,
        method,
        base="base",
        parameters={"seed": 4, "weight": {"a": 1, "b": 2, "c": 0.5}},
    )
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in found.values())
    assert found.pop("norm.num_batches_tracked") == 0
    floating = {
        name: {key: stored(tensor.detach()) for key, tensor in state.items() if tensor.is_floating_point()}
        for name, state in states.items()
    }
    result = wanted(method, floating["base"], [floating[k] for k in "abc"], seed=4, weights=lambda _name: [1, 2, 0.5])
    result |= {f"tied.{name}": result[f"inner.{name}"] for name in ("weight", "bias")}
    expectation.assert_same({name: stored(tensor) for name, tensor in found.items()}, result)
    Small(0).load_state_dict(found | {"norm.num_batches_tracked": torch.tensor(0)})


@shows("Commands and options", "`merge_tensors`", note="results carry no autograd history")
@both_methods
def test_merge_tensors(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randint(0, 3, (7, 9), generator=generator).float().requires_grad_() for _ in range(4)]
    found = merge_tensors(tensors, method, base_index=0, name="w", parameters={"weight": [1, 1, 2], "seed": 6})
    assert not found.requires_grad
    base, *subs = [{"w": stored(tensor.detach())} for tensor in tensors]
    result = wanted(method, base, subs, seed=6, weights=lambda _name: [1, 1, 2])
    expectation.assert_same({"w": stored(found)}, result)
