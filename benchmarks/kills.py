"""Kill a large merge at random moments, go on with it each time, and compare with what stock `mergekit-yaml` writes.

`python benchmarks/kills.py --scratch FOLDER --out FOLDER` writes kills.json and kills.md to the latter. A merge that
ends before it is killed is compared, and another one begun, until there were as many kills as asked for. With `--ray`,
a node of a Ray cluster of three is killed instead, once some parts are recorded, and the same command must end well.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

import machine
import tables
import whole_process
from executor import METHOD

_COMMAND = Path(sys.executable).with_name("mergekit-select")


@dataclass(frozen=True)
class Attempt:
    """One run of the command.

    Attributes:
        seconds: How long it ran.
        killed: Whether it was killed; otherwise it finished.
        parts: How many parts were recorded when it ended.
        looked_finished: Whether the folder had a config.json before the merge was done.
    """

    seconds: float
    killed: bool
    parts: int
    looked_finished: bool


@click.command()
@click.option("--scratch", type=click.Path(file_okay=False, path_type=Path), required=True, help="For the checkpoints.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--kills", default=20, show_default=True, help="How often to kill.")
@click.option("--most", default=20.0, show_default=True, help="Most seconds before a kill; they are drawn evenly.")
@click.option("--jobs", default=2, show_default=True)
@click.option("--ray", is_flag=True, help="Kill nodes of a Ray cluster, not the command.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--size", type=click.Choice(["tiny", "full", "large"]), default="large", show_default=True)
def main(scratch: Path, out: Path, kills: int, most: float, jobs: int, ray: bool, seed: int, size: str) -> None:
    """Count kills, and compare every finished merge tensor by tensor."""
    facts = machine.describe()
    folder = scratch.resolve() / size
    whole_process._llama("write", folder, size)
    recipe, stock, merged = folder / f"{METHOD}.yml", folder / "stock", folder / "killed"
    recipe.write_text(json.dumps(whole_process.recipe_of(folder, METHOD)))
    shutil.rmtree(stock, ignore_errors=True)
    whole_process.measure(
        [str(_COMMAND.with_name("mergekit-yaml")), str(recipe), str(stock), "--quiet", "--no-copy-tokenizer"]
    )
    expected = digests(stock)
    shutil.rmtree(stock)
    where = ["--ray"] if ray else ["--jobs", str(jobs)]
    command = [str(_COMMAND), "merge", str(recipe), str(merged), "--quiet", "--no-copy-tokenizer"]
    moments, merges, attempts = random.Random(seed), 0, list[Attempt]()
    shutil.rmtree(merged, ignore_errors=True)
    while sum(attempt.killed for attempt in attempts) < kills or not merges:
        enough = sum(attempt.killed for attempt in attempts) >= kills
        if ray:
            attempts += bereaved([*command, "--out-shard-size", "200M"], merged)
        else:
            attempts.append(attempted([*command, *where], merged, None if enough else moments.uniform(0.0, most)))
        click.echo(f"{len(attempts)}: {attempts[-1]}", err=True)
        if not attempts[-1].killed:
            if digests(merged) != expected:
                raise SystemExit(f"merge {merges + 1} differs from what mergekit-yaml wrote")
            merges += 1
            shutil.rmtree(merged)
    write(out, facts, where, attempts, merges, len(expected))


def attempted(command: Sequence[str], merged: Path, seconds: float | None) -> Attempt:
    """Run a command in a session of its own and kill all of it after so many seconds, unless it ends before."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Attempt(time.perf_counter() - start, True, recorded(merged), looks_finished(merged))
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {said.decode(errors='replace')[-2000:]}")
    return Attempt(time.perf_counter() - start, False, 0, False)


def bereaved(command: Sequence[str], merged: Path) -> list[Attempt]:
    """Run a command on a Ray cluster of its own, one of whose nodes is killed in the middle; return kill and end."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    workers = [nodes.add_node(num_cpus=1, memory=4 << 30) for _ in range(2)]
    nodes.wait_for_nodes()
    start = time.perf_counter()
    try:
        with subprocess.Popen([*command, "--ray", nodes.address], stderr=subprocess.PIPE) as process:
            while recorded(merged) < 2 and process.poll() is None:
                time.sleep(0.02)
            kill = Attempt(
                time.perf_counter() - start, process.poll() is None, recorded(merged), looks_finished(merged)
            )
            nodes.remove_node(workers[0], allow_graceful=False)
            _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {said.decode(errors='replace')[-2000:]}")
        return [kill, Attempt(time.perf_counter() - start, False, 0, False)]
    finally:
        ray.shutdown()
        nodes.shutdown()


def looks_finished(merged: Path) -> bool:
    """Return whether an unfinished folder has a config.json."""
    return (merged / "config.json").exists() and not (merged / ".merge" / "tensors.json").exists()


def recorded(merged: Path) -> int:
    """Return how many parts of a merge are recorded."""
    return len([*merged.glob(".merge/parts/*.json")])


def digests(folder: Path) -> dict[str, str]:
    """Return the identity of every tensor, read in another process."""
    program = (
        "import json, sys; from pathlib import Path; from mergekit_select.provenance.recording import read_tensors; "
        "print(json.dumps({k: v.sha256 for k, v in read_tensors(Path(sys.argv[1])).tensors.items()}))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True)
    result: dict[str, str] = json.loads(done.stdout)
    return result


def write(
    out: Path,
    facts: dict[str, str | int | float],
    where: Sequence[str],
    attempts: Sequence[Attempt],
    merges: int,
    n: int,
) -> None:
    """Write the results down."""
    killed = [attempt for attempt in attempts if attempt.killed]
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "where": where, "merges": merges, "attempts": [asdict(a) for a in attempts]}
    (out / "kills.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    rows = [
        [
            " ".join(where),
            str(len(killed)),
            str(merges),
            str(n),
            str(sum(attempt.looked_finished for attempt in killed)),
            str(sum(attempt.parts > 0 for attempt in killed)),
        ]
    ]
    header = [
        "how",
        "kills",
        "merges finished, all equal",
        "tensors each",
        "looked finished before",
        "kills amid parts",
    ]
    (out / "kills.md").write_text(f"{tables.machine(facts)}\n{tables.table(header, rows)}", encoding="utf-8")
    click.echo(f"{len(killed)} kills, {merges} merges finished and equal to mergekit-yaml's")


if __name__ == "__main__":
    main()
