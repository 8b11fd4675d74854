"""``check`` on models that are missing, unreadable, quantised or twice the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_select.check import opening
from mergekit_select.findings import Severity
from tests.check.cases import Case, Cases, checked, kinds, only
from tests.support.adapters import write_adapter
from tests.support.checkpoints import (
    Tensors,
    copied,
    pickled,
    reshard,
    tensors_of,
)
from tests.support.models import Family
from tests.support.recipes import RESAMPLING, SELECTION, merge, recipe

CASES = Cases()


@CASES.add("model-missing")
def missing_model(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(SELECTION, llamas.base, [llamas.subs[0], tmp / "absent"]))


@CASES.add("model-missing")
def model_without_weights(llamas: Family, tmp: Path) -> Case:
    folder = copied(llamas.subs[0], tmp / "sub")
    (folder / "model.safetensors").unlink()
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("model-missing")
def adapter_without_its_base(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(SELECTION, llamas.base, [write_adapter(tmp / "lora")]))


@CASES.add("model-missing")
def folder_of_a_training(llamas: Family, tmp: Path) -> Case:
    for step in (9, 10):
        copied(llamas.subs[0], tmp / "run" / f"checkpoint-{step}")
    return Case(recipe(SELECTION, llamas.base, [tmp / "run"]))


@CASES.add("model-missing")
def index_naming_a_missing_shard(llamas: Family, tmp: Path) -> Case:
    folder = reshard(llamas.subs[0], tmp / "sub", 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("model-unreadable")
def truncated_safetensors(llamas: Family, tmp: Path) -> Case:
    folder = copied(llamas.subs[0], tmp / "sub")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("hub-unreachable")
def hub_id_offline(llamas: Family, tmp: Path) -> Case:
    return Case(recipe(SELECTION, llamas.base, ["nobody/absent"]))


@CASES.add("model-quantised")
def gguf_file(llamas: Family, tmp: Path) -> Case:
    folder = tmp / "gguf"
    folder.mkdir()
    shutil.copy(llamas.base / "config.json", folder)
    (folder / "model-Q4.gguf").write_bytes(b"GGUF")
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("model-quantised")
def gptq(llamas: Family, tmp: Path) -> Case:
    def quantise(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            tensors[name.replace("weight", "qweight")] = tensors.pop(name).to(torch.int32)

    folder = copied(llamas.subs[0], tmp / "sub", quantise, quantization_config={"quant_method": "gptq"})
    return Case(recipe(SELECTION, llamas.base, [folder]))


@CASES.add("model-quantised")
def float8_with_scales(llamas: Family, tmp: Path) -> Case:
    def quantise(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name + "_scale_inv"] = torch.full((1,), 2.0)
        tensors[name] = (tensors[name].float() / 2).to(torch.float8_e4m3fn)

    def wrong(out: Path) -> bool:  # the scale is lost
        return not any("scale" in name for name in tensors_of(out))

    folder = copied(llamas.subs[0], tmp / "sub", quantise)
    return Case(recipe(SELECTION, llamas.base, [folder], dtype="bfloat16"), wrong)


@CASES.add("config-invalid")
def config_of_an_unknown_type(llamas: Family, tmp: Path) -> Case:
    folder = copied(llamas.subs[0], tmp / "sub", model_type="lama")
    return Case(recipe(SELECTION, llamas.base, [folder]))


def test_a_link_to_the_same_file(llamas: Family, tmp_path: Path) -> None:
    (tmp_path / "copy").symlink_to(llamas.subs[0])
    report = checked(tmp_path, recipe(SELECTION, llamas.base, [llamas.subs[0], tmp_path / "copy"]))
    assert only(report, "same-file").place == "models[1].model"


def test_a_selection_of_a_selection_needs_a_seed_of_its_own(llamas: Family, tmp_path: Path) -> None:
    first, second, third = llamas.subs[:3]
    stage = merge(recipe(SELECTION, llamas.base, [first, second]), tmp_path / "stage")
    seeds = {"left out": {}, "repeated": {"seed": 0}, "another": {"seed": 1}}
    shares = {}
    for name, parameters in seeds.items():
        config = recipe(SELECTION, llamas.base, [third, stage], parameters=parameters)
        report = checked(tmp_path, config)
        if name == "another":
            assert "seed-repeats" not in kinds(report)
        else:
            assert only(report, "seed-repeats").place == "models[1].model"
            assert report.passes()
        out, one, two, three = map(tensors_of, (merge(config, tmp_path / name), first, second, third))
        told = [(one[key] != two[key]) & (one[key] != three[key]) for key in out]  # where a value of one is no other's
        taken = [(out[key] == one[key])[where] for key, where in zip(out, told, strict=True)]
        shares[name] = float(torch.cat(taken).float().mean())
    # With one seed, the stage is taken as the second of two only where it has taken the second of its own two.
    assert shares["left out"] == shares["repeated"] == 0
    assert shares["another"] == pytest.approx(1 / 4, abs=0.02)


def test_the_seeds_of_stages_are_compared_before_there_is_an_output(llamas: Family, tmp_path: Path) -> None:
    stage = recipe(SELECTION, llamas.base, llamas.subs[:2], name="stage", parameters={"seed": 3})
    last = recipe(RESAMPLING, llamas.base, ["stage", llamas.subs[2]], parameters={"seed": 3})
    assert only(checked(tmp_path, [stage, last]), "seed-repeats").value == "stage"
    for other in (last | {"parameters": {"seed": 4}}, last | {"merge_method": "linear", "parameters": {"weight": 1}}):
        assert "seed-repeats" not in kinds(checked(tmp_path, [stage, other]))


def test_what_is_no_recipe_in_a_models_folder_is_passed_over(llamas: Family, tmp_path: Path) -> None:
    folder = copied(llamas.subs[0], tmp_path / "sub")
    for text in ("merge_method: [", "merge_method: 3\n", "- 1\n", "merge_method: parameter_selection\nmodels: 7\n"):
        (folder / "mergekit_config.yml").write_text(text)
        assert kinds(checked(tmp_path, recipe(SELECTION, llamas.base, [folder, llamas.subs[1]]))) == []


def test_pickles_are_reported_and_never_executed(llamas: Family, tmp_path: Path) -> None:
    folder = pickled(llamas.subs[0], tmp_path / "sub")
    config = recipe(SELECTION, llamas.base, [folder, llamas.subs[1]])
    report = checked(tmp_path, config)
    assert kinds(report) == ["model-pickled"]
    merge(config, tmp_path / "out")

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"x": Harmful()}, folder / "pytorch_model.bin")
    report = checked(tmp_path, config)
    assert "model-unreadable" in kinds(report, Severity.ERROR)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("works", [True, False])
def test_lazy_unpickling_is_an_error_where_mergekits_fails(
    llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    # That it fails from Python 3.13 on: tests/end_to_end/test_checkpoint_forms.py.
    monkeypatch.setattr(opening, "_LAZY_UNPICKLE_WORKS", works)
    folder = pickled(llamas.subs[0], tmp_path / "sub")
    config = recipe(SELECTION, llamas.base, [folder, llamas.subs[1]])
    wanted = ["model-pickled"] if works else ["model-pickled", "lazy-unpickle"]
    assert kinds(checked(tmp_path, config, lazy_unpickle=True)) == wanted
    assert kinds(checked(tmp_path, config)) == ["model-pickled"]


@pytest.mark.filterwarnings("ignore")
def test_a_plugin_turned_off_and_a_path_like_a_hub_id(
    llamas: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    monkeypatch.chdir(tmp_path)
    shutil.copytree(llamas.subs[0], "m")
    config = recipe(SELECTION, llamas.base, ["m", llamas.subs[1]])
    report = checked(tmp_path, config)
    assert only(report, "local-path-like-hub-id").severity is Severity.ERROR  # offline, as all tests are
    with pytest.raises(OfflineModeIsEnabled):
        merge(config, tmp_path / "out")
    monkeypatch.setenv("MERGEKIT_SELECT_DISABLE", "1")
    assert only(checked(tmp_path, config), "plugin-inactive").severity is Severity.ERROR
    code = f"from mergekit.merge_methods import get; get({SELECTION!r})"  # in a process that inherits the variable
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Unimplemented merge method" in result.stderr


def test_a_file_that_may_not_be_read(llamas: Family, tmp_path: Path) -> None:
    folder = copied(llamas.subs[0], tmp_path / "sub")
    (folder / "config.json").chmod(0)
    if os.access(folder / "config.json", os.R_OK):
        pytest.skip("this user may read every file")
    report = checked(tmp_path, recipe(SELECTION, llamas.base, [folder]))
    assert only(report, "model-unreadable").message == f"cannot read {folder}/config.json: Permission denied"


@pytest.mark.parametrize(("name", "kind"), [("model.gguf", "model-quantised"), ("model.safetensors", "model-missing")])
def test_a_file_is_no_model(name: str, kind: str, llamas: Family, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"")
    report = checked(tmp_path, recipe(SELECTION, llamas.base, [file, llamas.subs[0]]))
    assert [(f.kind, f.place) for f in report.findings if f.severity is Severity.ERROR] == [(kind, "models[0].model")]


def test_a_folder_that_is_no_model_but_has_one(llamas: Family, tmp_path: Path) -> None:
    """An adapter, the folder of a training, a GGUF file: each is named, with what to give instead."""
    for make, remedy in (
        (adapter_without_its_base, "write BASE+"),
        (folder_of_a_training, f"give one of them, such as {tmp_path / 'run' / 'checkpoint-10'}"),
    ):
        assert only(checked(tmp_path, make(llamas, tmp_path).config), "model-missing").remedy.startswith(remedy)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "model.gguf").touch()
    report = checked(tmp_path, recipe(SELECTION, llamas.base, [tmp_path / "packed"]))
    assert only(report, "model-quantised").message.startswith("mergekit reads no GGUF files")
