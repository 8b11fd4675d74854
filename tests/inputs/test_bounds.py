"""Nothing is read without a bound: neither bombs, nor pipes and devices, nor files outside a model's folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import Result

from mergekit_select.errors import UnreadableError
from mergekit_select.inputs.bounds import MOST_JSON_BYTES, require_regular_files
from tests.support.checkpoints import copied, edit_json, reshard, weight_map
from tests.support.commands import invoke, one_line
from tests.support.models import Family, small_family
from tests.support.recipes import merge, written

MOST_SECONDS = 15  # of a case; on an idle machine all take less than 3

ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
TEXTS = {
    "aliases": ALIASES + "merge_method: linear",
    "alias within itself": "merge_method: linear\nmodels: &m [*m]",
    "duplicate keys": "k: 1\n" * 100_000,
    "gradient": f"merge_method: linear\nparameters: {{weight: [{','.join(['0.5'] * 100_000)}]}}",
    "hexadecimal": f"merge_method: linear\nparameters: {{seed: 0x{'f' * 4000}}}",
    "decimal": f"merge_method: linear\nparameters: {{seed: {'9' * 5000}}}",
    "depth": "merge_method: linear\nmodels: " + "[" * 20_000,
    "one long word": "x" * 1_000_000,
    "too long": "x" * 1_100_000,
}


def refused(result: Result, code: int = 2) -> None:
    one_line(result, code, "")
    assert "bug" not in result.output
    assert len(result.output) < 2000


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("command", ["check", "inspect"])
def test_recipes(command: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(text)
    began = time.monotonic()
    refused(invoke(command, tmp_path / "recipe.yml"))
    assert time.monotonic() - began < MOST_SECONDS


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


@pytest.mark.parametrize("make", [pipe, device, sparse], ids=lambda make: make.__name__)
class TestWhatIsNoBoundedRegularFile:
    def test_recipe(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "recipe.yml")
        for command in ("check", "inspect"):
            refused(invoke(command, tmp_path / "recipe.yml"))

    @pytest.mark.parametrize(
        "file", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    )
    def test_model_and_output(self, make: Callable[[Path], None], file: str, tmp_path: Path) -> None:
        family = small_family().copied(tmp_path / "models")
        recipe = written(tmp_path / "recipe.yml", family.recipe())
        out = merge(family.recipe(), tmp_path / "out")
        for folder in (out, family.base):
            (folder / file).unlink(missing_ok=True)
            make(folder / file)
        began = time.monotonic()
        refused(invoke("verify", out))
        refused(invoke("inspect", recipe))
        result = invoke("check", recipe)
        assert result.exit_code == 1
        assert str(family.base / file) in result.output
        assert time.monotonic() - began < 3 * MOST_SECONDS


@pytest.mark.parametrize(("name", "refused"), [("config.json", True), ("trainer_state.json", False)])
def test_json_that_is_read_is_bounded(name: str, refused: bool, tmp_path: Path) -> None:
    """A Trainer's log grows with the training, and nothing loads it with the model."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(UnreadableError, match="must have at most") if refused else nullcontext():
        require_regular_files(tmp_path)


def test_names_that_are_too_long(tmp_path: Path) -> None:
    name = "m" * 5000
    family = small_family()
    for model in (name, f"./{name}", f"{family.base}+{name}"):
        recipe = written(tmp_path / "recipe.yml", {**family.recipe(), "base_model": model})
        assert invoke("check", recipe).exit_code == 1
        assert invoke("inspect", recipe).exit_code in (1, 2)
    recipe = written(tmp_path / "recipe.yml", family.recipe())
    for command in (["check", recipe, name], ["check", name], ["inspect", name], ["verify", name]):
        assert invoke(*command).exit_code in (1, 2)


def test_config_of_odd_types(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    edit_json(family.base / "config.json", text_config=5)
    assert invoke("check", written(tmp_path / "recipe.yml", family.recipe())).exit_code in (0, 1)


HEADERS = [
    b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [99999999999999999999], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"a": 5}',
    b"[]",
    b"{" * 5000,
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers(header: bytes, tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    recipe = written(tmp_path / "recipe.yml", family.recipe())
    out = merge(family.recipe(), tmp_path / "out")
    for folder in (out, family.base):
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(invoke("verify", out))
    refused(invoke("inspect", recipe))
    assert invoke("check", recipe).exit_code == 1


class TestWeightMapThatLeadsOut:
    @pytest.fixture
    def family(self, tmp_path: Path) -> Family:
        copied(small_family().root, tmp_path / "models")
        return Family(tmp_path / "models")

    @pytest.mark.parametrize("way", ["absolute", "dots", "link", "surrogate", "nul"])
    def test_is_refused(self, way: str, family: Family, tmp_path: Path) -> None:
        secret = tmp_path / "secret.safetensors"
        secret.write_text("SECRET")
        merged = merge(family.recipe(), tmp_path / "before")
        (family.base / "linked.safetensors").symlink_to(secret)
        names = {
            "absolute": str(secret),
            "dots": "../../secret.safetensors",
            "link": "linked.safetensors",
            "surrogate": "\ud800",
            "nul": "x\0",
        }
        assert merged.exists()
        sharded = reshard(family.base, tmp_path / "sharded", 2)
        with weight_map(sharded) as names_of:
            names_of["model.norm.weight"] = names[way]
        (family.base / "model.safetensors.index.json").write_bytes(
            (sharded / "model.safetensors.index.json").read_bytes()
        )
        recipe = written(tmp_path / "recipe.yml", family.recipe())
        for file in ("linked.safetensors",):
            if not (merged / file).exists():
                (merged / file).symlink_to(secret)
        (merged / "model.safetensors").unlink()
        (merged / "model.safetensors.index.json").write_bytes((sharded / "model.safetensors.index.json").read_bytes())
        for command in (["check", recipe], ["inspect", recipe], ["verify", merged]):
            result = invoke(*command)
            assert result.exit_code in (1, 2), result.output
            assert "must name files of its own folder" in result.output
            assert "SECRET" not in result.output

    def test_links_of_the_hubs_cache_are_followed(self, family: Family, tmp_path: Path) -> None:
        sharded = reshard(family.base, tmp_path / "sharded", 2)
        blobs = tmp_path / "models--owner--name" / "blobs"
        snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted(sharded.iterdir())):
            file.rename(blobs / str(number))
            (snapshot / file.name).symlink_to(Path("../../blobs", str(number)))
        recipe = written(tmp_path / "recipe.yml", {**family.recipe(), "base_model": str(snapshot)})
        assert invoke("check", recipe).exit_code == 0
        result = invoke("inspect", recipe)
        assert result.exit_code == 0, result.output
        assert (
            invoke("verify", merge({**family.recipe(), "base_model": str(snapshot)}, tmp_path / "out")).exit_code == 0
        )
