"""The same recipe gives the same bits, whatever the process, the threads and the files; through the real command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import copied, digests, reshard
from tests.support.models import Family
from tests.support.recipes import RESAMPLING, SELECTION, Recipe, merge, recipe

PARAMETERS: dict[str, Recipe] = {SELECTION: {"seed": 11}, RESAMPLING: {"seed": 11, "rounds": 1}}

Merged = tuple[str, dict[str, str]]


@pytest.fixture(scope="module", params=PARAMETERS)
def merged(request: pytest.FixtureRequest, llamas: Family, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """A method, and the digests of its plain result."""
    config = llamas.recipe(request.param, parameters=PARAMETERS[request.param])
    return request.param, digests(merge(config, tmp_path_factory.mktemp("plain") / "out", new_process=True))


@pytest.mark.parametrize(
    ("options", "env"),
    [
        ({"out_shard_size": 5000, "num_threads": 1}, {"PYTHONHASHSEED": "1"}),
        ({"async_write": True, "random_seed": 3}, {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "5"}),
    ],
    ids=str,
)
def test_options_and_environment_change_no_bit(
    merged: Merged, llamas: Family, tmp_path: Path, options: dict[str, Any], env: dict[str, str]
) -> None:
    method, expected = merged
    config = llamas.recipe(method, parameters=PARAMETERS[method])
    out = merge(config, tmp_path / "out", new_process=True, env=env, **options)
    assert digests(out) == expected
    assert (out / "model.safetensors.index.json").exists() == ("out_shard_size" in options)


def test_shards_and_paths_of_the_inputs_change_no_bit(merged: Merged, llamas: Family, tmp_path: Path) -> None:
    method, expected = merged
    base = reshard(llamas.base, tmp_path / "elsewhere", 3)
    subs = [reshard(sub, tmp_path / f"copy {k}", k + 2) for k, sub in enumerate(llamas.subs[:2])]
    subs.append(copied(llamas.subs[2], tmp_path / "z"))
    out = merge(recipe(method, base, subs, parameters=PARAMETERS[method]), tmp_path / "out", new_process=True)
    assert digests(out) == expected


def test_seed_and_order_of_the_models_do_change_bits(merged: Merged, llamas: Family, tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    method, expected = merged
    same = llamas.recipe(method, parameters=PARAMETERS[method])
    assert digests(merge(same, tmp_path / "same")) == expected
    other_order = recipe(method, llamas.base, llamas.subs[::-1], parameters=PARAMETERS[method])
    assert digests(merge(other_order, tmp_path / "order")) != expected
    other_seed = llamas.recipe(method, parameters={**PARAMETERS[method], "seed": 12})
    assert digests(merge(other_seed, tmp_path / "seed")) != expected
