"""Ray: a real cluster of several nodes on this machine, one of which dies in the middle of a merge."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_select.errors import PlanError, UnreadableError
from mergekit_select.execution import cluster
from mergekit_select.execution.request import Request
from tests.support.recipes import merge as merge_stock

SIZE = 1_000  # bytes of a file: one for almost every tensor


@pytest.fixture
def nodes() -> Any:
    pytest.importorskip("ray")
    import ray
    from ray.cluster_utils import Cluster

    nodes: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes.workers = [nodes.add_node(num_cpus=1, memory=4 << 30) for _ in range(2)]
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_node_dies(llamas: Any, tmp_path: Path, nodes: Any) -> None:
    file, out = tmp_path / "recipe.yml", tmp_path / "ours" / "out"
    models = [{"model": str(model)} for model in llamas.subs]
    config = {"merge_method": "parameter_selection", "base_model": str(llamas.base), "models": models}
    file.write_text(yaml.safe_dump(config))
    stock = merge_stock(config, tmp_path / "out", out_shard_size=SIZE)
    seen: list[int] = []

    def kill_one() -> None:
        while len(list(out.glob(".merge/parts/*.json"))) < 3:
            time.sleep(0.02)
        seen.append(len(list(out.glob(".merge/parts/*.json"))))
        nodes.remove_node(nodes.workers[0], allow_graceful=False)

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = cluster.merge_on_ray(Request(str(file), str(out), {"out_shard_size": SIZE}), nodes.address)
    killer.join()
    assert outcome.finished
    names = sorted(path.name for path in stock.iterdir() if path.suffix in (".safetensors", ".json"))
    assert 3 <= seen[0] < len(names)  # it was in the middle
    for name in names:
        assert (stock / name).read_bytes() == (out / name).read_bytes(), name


def test_a_worker_that_does_not_see_the_output(tmp_path: Path) -> None:
    (tmp_path / "r.yml").touch()
    request = Request(str(tmp_path / "r.yml"), str(tmp_path / "out"), {})
    with pytest.raises(UnreadableError, match=f"node {socket.gethostname()} does not see .*plan.json; every node must"):
        cluster.merge_file(request, "model.safetensors", str(tmp_path))


def test_an_address_that_does_not_answer(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(PlanError, match=f"no Ray cluster answers at {address}: Connection refused"):
            cluster.merge_on_ray(Request("r.yml", "out", {}), address)


def test_an_address_that_is_none() -> None:
    pytest.importorskip("ray")
    with pytest.raises(PlanError, match=r"--ray must be auto or host:port, such as 10.0.0.1:6379, got 'nowhere'"):
        cluster.merge_on_ray(Request("r.yml", "out", {}), "nowhere")
