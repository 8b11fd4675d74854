"""Several tasks at once; one at a time, they run in this thread."""

import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from examples.order_study.errors import StudyError

_Result = TypeVar("_Result")


def each(
    function: Callable[..., _Result],
    tasks: Iterable[tuple[Any, ...]],
    jobs: int,
    stop: Callable[[], None] | None = None,
    cluster: str | None = None,
    threads: int = 1,
) -> Generator[tuple[tuple[Any, ...], _Result], None, None]:
    """Call a function of a module with each tuple of arguments; yield these and the result as they get done.

    Each call has a process of its own, or a thread where the work is that of other programs, which `stop` ends. After
    an error no further task is begun, and those that are under way are stopped or else waited for. With a Ray
    `cluster`, calls run on its nodes, as many as have `threads` cores to spare, and `jobs` does not matter.

    Raises:
        StudyError: A process was ended from outside, or the cluster cannot be used.
    """
    waiting = list(tasks)
    if cluster is not None and waiting:
        yield from _each_on_ray(function, waiting, cluster, threads)
        return
    workers = min(jobs, len(waiting))
    if workers < 2:
        for arguments in waiting:
            yield arguments, function(*arguments)
        return
    executor: Executor = ThreadPoolExecutor(workers)
    if stop is None:  # not forked: threads of torch do not survive that
        executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), quieten)
    futures = {executor.submit(function, *arguments): arguments for arguments in waiting}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise StudyError(
            f"each of {workers} jobs is a process, but one was ended from outside, most often for lack of memory: "
            "run again, which goes on where it stopped, with fewer jobs"
        ) from error
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        while stop is not None and not all(future.done() for future in futures):
            stop()  # more than once: a thread may just be about to start its program
            time.sleep(0.05)
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _each_on_ray(
    function: Callable[..., _Result], tasks: list[tuple[Any, ...]], address: str, threads: int
) -> Generator[tuple[tuple[Any, ...], _Result], None, None]:
    """Do it on the driver of `mergekit-select merge --ray`; every node sees this folder and the study's."""
    from mergekit_select.errors import MergekitSelectError, one_line
    from mergekit_select.execution import cluster

    here = os.getcwd()
    try:
        with cluster.connected(address, here) as ray:
            calls = [(here, function, task) for task in tasks]
            try:
                for (_, _, task), result in cluster.each(ray, _call, calls, cpus=threads):
                    yield task, result
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise StudyError(
                    f"Ray lost a task: {one_line(error)}: run again, which goes on where it stopped"
                ) from error
    except MergekitSelectError as error:
        raise StudyError(str(error)) from error


def _call(folder: str, function: Callable[..., _Result], arguments: tuple[Any, ...]) -> _Result:
    os.chdir(folder)
    quieten()
    return function(*arguments)


def quieten() -> None:
    """Keep transformers from drawing a bar for each model that is loaded or saved."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as transformers ships it
