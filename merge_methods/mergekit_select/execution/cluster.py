"""Many machines: Ray runs a task for each file of the output, and the folder, which all of them see, holds the rest."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_select.errors import MergekitSelectError, PlanError, UnreadableError, one_line
from mergekit_select.execution.local import PROCESS_BYTES, Outcome, Progress, Started
from mergekit_select.execution.request import Request
from mergekit_select.inputs.processors import cores

if TYPE_CHECKING:
    from mergekit_select.execution.job import Job

_Result = TypeVar("_Result")

_ANSWER = 10.0  # seconds within which an address has to answer
_RETRIES = 5  # times that a task is begun again when its node dies
_ROUNDS = 3  # times that what is missing after all tasks have ended is asked for again


def merge_on_ray(
    request: Request, address: str, *, started: Started = lambda job, jobs: None, progress: Progress = lambda job: None
) -> Outcome:
    """Merge on a Ray cluster, or go on with a merge that was interrupted; no tensor passes through Ray.

    Args:
        request: What to merge; recipe, models and output lie on a file system that every node sees.
        address: The cluster's ``host:port``, or ``auto`` for the one that runs here, else one of this machine alone.
        started: Called with the merge once it is planned, and with the number of cores.
        progress: Called with it whenever more may be done.

    Raises:
        MergekitSelectError: There is no Ray or no cluster, the merge is refused, or a node does not see the files.
    """
    request = replace(request, recipe=os.path.abspath(request.recipe), out=_absolute(request.out))
    from mergekit_select.execution.finish import finish
    from mergekit_select.execution.job import opened_job
    from mergekit_select.execution.work import forget_lost
    from mergekit_select.execution.workspace import WHOLE

    with connected(address) as ray, opened_job(request) as job:
        if not job.workspace.acquire(WHOLE):
            raise PlanError(f"another process is merging into {job.workspace.out}; wait for it, or stop it")
        anew = not job.workspace.finished
        if anew:
            forget_lost(job)
        started(job, _cpus(ray))
        for _ in range(_ROUNDS):
            if job.missing():
                _run(ray, job, request, progress)
        missing = job.missing()
        if missing:
            raise PlanError(f"{len(missing)} parts are missing after all tasks have ended; repeat the command")
        return Outcome(job.workspace.out, True, 0, _cpus(ray), finish(job), anew, tuple(job.cautions()))


def _run(ray: Any, job: Job, request: Request, progress: Progress) -> None:
    """Run a task for each file that is not whole, a bounded number of them at a time."""
    waiting = dict.fromkeys(part.file.name for part in job.missing())
    tasks = [(request, name, os.getcwd()) for name in waiting]
    memory = PROCESS_BYTES + job.layout.peak
    try:
        for _ in each(ray, merge_file, tasks, memory=memory, waited=lambda: progress(job)):
            pass
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MergekitSelectError):
            raise error.cause from error
        raise PlanError(f"a task failed: {one_line(error.cause)}") from error
    except ray.exceptions.RayError as error:
        raise PlanError(f"a task was lost more than {_RETRIES} times: {one_line(error)}") from error


def each(
    ray: Any,
    function: Callable[..., _Result],
    tasks: Iterable[tuple[Any, ...]],
    *,
    cpus: int = 1,
    memory: int | None = None,
    waited: Callable[[], object] = lambda: None,
) -> Iterator[tuple[tuple[Any, ...], _Result]]:
    """Call a function of a module with each tuple of arguments, on any node; yield these and the result, as they come.

    A bounded number of calls is under way. What a node was at when it died is begun again on another one.

    Args:
        ray: The module, connected.
        function: What to call; what it returns travels to this process.
        tasks: Its arguments.
        cpus: Cores that a call takes.
        memory: Bytes that a call takes.
        waited: Called about once a second.

    Raises:
        ray.exceptions.RayError: A call has failed, or its nodes have died too often.
    """
    task = ray.remote(function).options(
        num_cpus=cpus, memory=memory, max_retries=_RETRIES, scheduling_strategy="SPREAD"
    )
    waiting, running = list(tasks), dict[Any, tuple[Any, ...]]()
    while waiting or running:
        while waiting and len(running) < 2 * _cpus(ray):
            arguments = waiting.pop(0)
            running[task.remote(*arguments)] = arguments
        done, _ = ray.wait([*running], timeout=1.0)
        waited()
        for reference in done:
            yield running.pop(reference), ray.get(reference)


def merge_file(request: Request, name: str, folder: str) -> None:
    """Merge what is missing of one file of the output, on a node of the cluster."""
    from mergekit_select.execution.job import opened_job
    from mergekit_select.execution.work import work
    from mergekit_select.inputs.files import WORKSPACE
    from mergekit_select.planner.together import share_threads

    node = socket.gethostname()
    for path in (request.recipe, Path(request.out, WORKSPACE, "plan.json"), folder):
        if not os.path.exists(path):
            raise UnreadableError(f"node {node} does not see {path}; every node must see recipe, models and output")
    os.chdir(folder)  # relative paths in a recipe begin here
    with opened_job(request) as job:
        share_threads(job.engine.plan.config, job.engine.plan.options, cores())
        work(job, [part for part in job.layout.parts if part.file.name == name])


@contextmanager
def connected(address: str, folder: str | None = None) -> Iterator[Any]:
    """Give a block the module ray, connected to a cluster.

    Args:
        address: Its ``host:port``, or ``auto`` for the one that runs here, else one of this machine alone.
        folder: Where nodes find modules that are not installed.

    Raises:
        PlanError: Ray is not installed, or nobody answers.
    """
    try:
        import ray
    except ImportError as error:
        raise PlanError("--ray needs Ray; install it with: pip install 'ray>=2.9,<3'") from error
    environment = {} if folder is None else {"runtime_env": {"env_vars": {"PYTHONPATH": folder}}}
    options: Mapping[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", **environment}
    if ray.is_initialized():
        yield ray
        return
    if address == "auto":
        try:
            ray.init("auto", **options)
        except ConnectionError:
            ray.init("local", **options)
    else:
        _require_answer(address)
        ray.init(address, **options)
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ask an address whether anybody is there, since Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        raise PlanError(f"--ray must be auto or host:port, such as 10.0.0.1:6379, got {address!r}")
    try:
        socket.create_connection((host, int(port)), _ANSWER).close()
    except OSError as error:
        raise PlanError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error


def _cpus(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _absolute(out: str) -> str:
    """Return an absolute path that ends as it was given: its last part titles the model card."""
    return os.path.join(os.getcwd(), out)
