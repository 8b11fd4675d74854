"""A whole study: train, merge, measure, and write what came out; all that exists already is reused."""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from examples.order_study import parallel
from examples.order_study.analysis import results
from examples.order_study.analysis.figures import draw
from examples.order_study.analysis.report import render
from examples.order_study.data import order
from examples.order_study.data.parts import read_parts
from examples.order_study.derived import derive
from examples.order_study.errors import StudyError
from examples.order_study.measure.measure import Measurer
from examples.order_study.measured import Measurements, PartCount, Positions
from examples.order_study.merge.merges import make_merges, remove_others
from examples.order_study.model import Model, merged, others, trained
from examples.order_study.settings import DERIVED_CONTROLS, ENSEMBLE, Study
from examples.order_study.store.disk import check_space, writing_to
from examples.order_study.store.folders import Record, read_record, write_record, write_whole
from examples.order_study.store.places import FIGURES, MODELS, REPORT, RESULTS
from examples.order_study.train.models import train_models
from examples.order_study.train.trainer import relative_rates

Report = Callable[[str], None]


def run_study(study: Study, root: Path, report: Report, jobs: int = 1, ray: str | None = None) -> results.Results:
    """Run a study in a folder, from wherever an earlier run there left it.

    Args:
        study: The settings.
        root: The folder; it is made if it is not there.
        report: Takes one line at a time.
        jobs: How many models are trained, merged or measured at the same time.
        ray: The address of a Ray cluster that trains and measures them instead.

    Raises:
        StudyError: The folder is someone else's, something is missing, or a rule of the data or of a model is broken.
    """
    if importlib.util.find_spec("matplotlib") is None:  # before anything is trained, not hours later
        raise StudyError("figures are drawn by matplotlib, which is not installed: pip install '.[study]'")
    parallel.quieten()
    _claim(study, root, report)
    report(check_space(study, root, jobs))
    done = train_models(study, root, read_parts(study), report, jobs, ray)
    with writing_to(root):
        _name_others(study, root, report)
        merges = merged(study, done.steps)
        remove_others(root, merges, report, sparing=tuple(name for name in DERIVED_CONTROLS if name in study.controls))
        make_merges(study, root, merges, report, jobs)
        measurer = Measurer(study, root, done, report, jobs, ray)
        controls, tried = derive(measurer)
        remove_others(root, [*merges, *controls, *tried], report)
        ensemble = [Model("control", control=ENSEMBLE)] * (ENSEMBLE in study.controls)
        every = [*trained(study, done.steps), *merges, *controls, *ensemble, *others(study)]
        models = measurer.measured(every)
        samples = len(done.samples["fine_tuning"].samples)
        found = results.build(
            Measurements(
                study=study,
                models=tuple(models),
                positions=tuple(_positions(study, seed, samples) for seed in study.orders),
                counts={part: PartCount(len(some.samples), some.left_out) for part, some in done.samples.items()},
                steps=study.fine_tuning.steps(samples),
            )
        )
        _write(found, root, report)
    return found


def _claim(study: Study, root: Path, report: Report) -> None:
    """Make the folder, or make sure that it is one of this program's, and write down the settings."""
    record = Record(made_from=study.model_dump(mode="json"))
    if root.exists() and (not root.is_dir() or any(root.iterdir())) and read_record(root) != record:
        report(f"{root}: other settings than the last time; what does not depend on them is reused")
    with writing_to(root):
        root.mkdir(parents=True, exist_ok=True)
        write_record(root, record)


def _name_others(study: Study, root: Path, report: Report) -> None:
    names = {run.name for run in study.sub_runs()}
    for folder in sorted((root / MODELS).glob("order-*")):
        if folder.name not in names:
            report(f"{folder}: not one of this study's orders; left as it is, and not merged or measured")


def _positions(study: Study, seed: int, samples: int) -> Positions:
    """When each fine-tuning sample that is measured was seen, in the epochs that were completed."""
    tuning, batches = study.fine_tuning, study.fine_tuning.batches(samples)
    epochs = max(1, tuning.steps(samples) // batches)
    places = [
        order.places(samples, seed, epoch, tuning.batch_size, study.composition)[: study.measuring.training_samples]
        for epoch in range(epochs)
    ]
    seen = np.stack([place + epoch * batches for epoch, place in enumerate(places)], axis=1)
    rates = relative_rates(tuning, samples)
    return Positions(
        order=f"order-{seed}",
        seen=seen,
        batches=batches,
        learning_rate=None if len(rates) <= seen.max() else rates[seen].sum(axis=1),
    )


def _write(found: results.Results, root: Path, report: Report) -> None:
    """Write table, numbers and figures aside, and put in place what is new."""
    with tempfile.TemporaryDirectory() as scratch:
        aside = Path(scratch)
        results.save(found, aside / RESULTS)
        figures = [path.name for path in draw(found, aside / FIGURES)]
        (aside / REPORT).write_text(render(found, [f"{FIGURES}/{name}" for name in figures]), encoding="utf-8")
        changed = [
            file.relative_to(aside)
            for file in sorted(aside.rglob("*.*"))
            if write_whole(root / file.relative_to(aside), file.read_bytes())
        ]
    for file in (root / FIGURES).glob("*.png"):
        if file.name not in figures:
            file.unlink()
    for name in (RESULTS, REPORT, FIGURES):
        written = any(file.parts[0] == name for file in changed)
        report(f"{root / name}: {'written' if written else 'as it was'}")
