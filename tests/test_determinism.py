"""The same recipe gives the same bits, whatever the process, the threads and the files; through the real command."""

from __future__ import annotations

import shutil

import pytest

from checkpoints import digests, merge, recipe, reshard

METHODS = {
    "parameter_selection": {"seed": 11},
    "parameter_selection_resampling": {"seed": 11, "rounds": 1},
}


@pytest.fixture(scope="module", params=METHODS)
def merged(request, llamas, tmp_path_factory):
    """A method, and the digests of its plain result."""
    folder = tmp_path_factory.mktemp("plain")
    config = recipe(request.param, llamas.base, llamas.subs, parameters=METHODS[request.param])
    done = merge(folder, config)
    assert done.returncode == 0, done.stderr
    return request.param, digests(folder / "out")


@pytest.mark.parametrize(
    ("options", "env"),
    [
        (["--out-shard-size", "5000", "--num-threads", "1"], {"PYTHONHASHSEED": "1"}),
        (["--async-write", "--random-seed", "3"], {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "5"}),
    ],
)
def test_options_and_environment_change_no_bit(merged, llamas, tmp_path, options, env):
    method, expected = merged
    config = recipe(method, llamas.base, llamas.subs, parameters=METHODS[method])
    done = merge(tmp_path, config, *options, env=env)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == expected
    if "--out-shard-size" in options:
        assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_shards_and_paths_of_the_inputs_change_no_bit(merged, llamas, tmp_path):
    method, expected = merged
    base = reshard(llamas.base, tmp_path / "elsewhere", 3)
    subs = [reshard(sub, tmp_path / f"copy {k}", k + 2) for k, sub in enumerate(llamas.subs[:2])]
    subs.append(tmp_path / "z")
    shutil.copytree(llamas.subs[2], subs[2])
    done = merge(tmp_path, recipe(method, base, subs, parameters=METHODS[method]))
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == expected


def test_seed_and_order_of_the_models_do_change_bits(merged, llamas, tmp_path):
    """Or the tests above could not fail."""
    method, expected = merged
    other_order = recipe(method, llamas.base, llamas.subs[::-1], parameters=METHODS[method])
    assert merge(tmp_path, other_order, name="order").returncode == 0
    assert digests(tmp_path / "order") != expected
    other_seed = recipe(method, llamas.base, llamas.subs, parameters={**METHODS[method], "seed": 12})
    assert merge(tmp_path, other_seed, name="seed").returncode == 0
    assert digests(tmp_path / "seed") != expected
