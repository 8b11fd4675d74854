"""A study with several throws: the whole of it for each, and tables over all of them."""

from collections.abc import Callable
from pathlib import Path

from examples.order_study.analysis import throws
from examples.order_study.settings import Study
from examples.order_study.store.folders import write_whole
from examples.order_study.store.places import REPORT, RESULTS
from examples.order_study.study import run_study

Report = Callable[[str], None]


def run_throws(
    study: Study, root: Path, report: Report, jobs: int = 1, ray: str | None = None, number: int | None = None
) -> None:
    """Run all throws of a study, or the one of that number from 1; without throws, the study as it is.

    Raises:
        StudyError: As `run_study` does.
    """
    if not study.throws:
        run_study(study, root, report, jobs, ray)
        return
    found = [
        run_study(one, root / f"throw-{place}", report, jobs, ray)
        for place, one in enumerate(study.each_throw(), start=1)
        if number in (None, place)
    ]
    if number is None:
        compared = throws.compare(found)
        for name, text in ((RESULTS, compared.model_dump_json(indent=1) + "\n"), (REPORT, throws.render(compared))):
            written = write_whole(root / name, text.encode())
            report(f"{root / name}: {'written' if written else 'as it was'}")
