"""Several tasks at once, each in a process of its own; one at a time, they run in this process."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import transformers
from tqdm import tqdm

from order_study.errors import StudyError

_Result = TypeVar("_Result")
_position: int | None = None  # of a progress bar; None: this process has the terminal for itself


def position() -> int | None:
    """The line of the terminal for the progress bars of this process."""
    return _position


def each(
    function: Callable[..., _Result], tasks: Iterable[tuple[Any, ...]], jobs: int
) -> Iterator[tuple[tuple[Any, ...], _Result]]:
    """Call a function of a module with each tuple of arguments; yield these and the result as they get done.

    Nothing is shared between processes but what is on disk. After an error no further task is begun; those that
    are under way are waited for.

    Raises:
        StudyError: A process was ended from outside.
    """
    waiting = list(tasks)
    if jobs == 1 or len(waiting) < 2:
        for arguments in waiting:
            yield arguments, function(*arguments)
        return
    # Not forked: threads of torch do not survive that.
    context = multiprocessing.get_context("spawn")
    positions = context.SimpleQueue()
    workers = min(jobs, len(waiting))
    for number in range(workers):
        positions.put(number)
    executor = ProcessPoolExecutor(workers, context, _begin, (positions, context.RLock()))
    try:
        futures = {executor.submit(function, *arguments): arguments for arguments in waiting}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise StudyError(
            f"each of {workers} jobs is a process, but one was ended from outside, most often for lack of memory: "
            "run again, which goes on where it stopped, with fewer jobs"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(positions: Any, lock: Any) -> None:
    global _position
    _position = positions.get()
    tqdm.set_lock(lock)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as transformers ships it
