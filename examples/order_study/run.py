"""A whole study: train, merge, measure, and write what came out; all that exists already is reused."""

import importlib.util
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from order_study.cache import write_whole
from order_study.catalogue import models_of
from order_study.disk import writing_to
from order_study.errors import StudyError
from order_study.figures import draw
from order_study.folders import FolderRecord, read_record
from order_study.material import positions, read_material
from order_study.measure import measure_all
from order_study.measurements import Measurements
from order_study.merging import make_merges
from order_study.recipes import MODELS
from order_study.report import render
from order_study.results import Results, build, save
from order_study.settings import Study
from order_study.space import check_space
from order_study.study import kept_steps, train_study

RECORD = "study.json"
RESULTS = "results.json"
REPORT = "results.md"
FIGURES = "figures"

Report = Callable[[str], None]


class StudyRecord(FolderRecord):
    """The contents of study.json: the settings last run in the folder."""

    study: Study


def run_study(study: Study, root: Path, report: Report, jobs: int = 1) -> Results:
    """Run a study in a folder, from wherever an earlier run there left it.

    Args:
        study: The settings.
        root: The folder; it is made if it is not there.
        report: Takes one line at a time.
        jobs: How many models are trained, merged or measured at the same time.

    Raises:
        StudyError: The folder is someone else's, something is missing, or a rule of the data or of a model is broken.
    """
    _require("matplotlib")
    _claim(study, root, report)
    check_space(study, root, jobs)
    train_study(study, root / MODELS, report, jobs)
    with writing_to(root):
        _name_others(study, root, report)
        measurements = _measurements(study, root, report, jobs)
        results = build(measurements)
        _write(results, root, report)
    return results


def _require(package: str) -> None:
    # Before anything is trained, not hours later.
    if importlib.util.find_spec(package) is None:
        raise StudyError(f"figures are drawn by {package}, which is not installed: pip install 'mergekit-select[plot]'")


def _claim(study: Study, root: Path, report: Report) -> None:
    """Make the folder, or make sure that it is one of this program's, and write down the settings."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        before = read_record(root, RECORD, StudyRecord)
        if before != StudyRecord(study=study):
            report(f"{root}: other settings than the last time; what does not depend on them is reused")
    with writing_to(root):
        write_whole(root / RECORD, (StudyRecord(study=study).model_dump_json(indent=2) + "\n").encode())


def _name_others(study: Study, root: Path, report: Report) -> None:
    names = {run.name for run in study.sub_runs()}
    for folder in sorted((root / MODELS).glob("order-*")):
        if folder.name not in names:
            report(f"{folder}: not one of this study's orders; left as it is, and not merged or measured")


def _measurements(study: Study, root: Path, report: Report, jobs: int) -> Measurements:
    steps = kept_steps(study, root / MODELS)
    merges = make_merges(study, root, steps, report, jobs)
    material = read_material(root / MODELS)
    models = measure_all(study, root, models_of(study, steps, merges), material, report, jobs)
    batches = math.ceil(len(material.fine_tuning) / study.fine_tuning.batch_size)
    return Measurements(
        study=study,
        models=tuple(models),
        positions=tuple(positions(study, seed, len(material.fine_tuning)) for seed in study.orders),
        counts=material.counts,
        steps=study.fine_tuning.epochs * batches,
    )


def _write(results: Results, root: Path, report: Report) -> None:
    """Write table, numbers and figures aside, and put in place what is new."""
    with tempfile.TemporaryDirectory() as scratch:
        aside = Path(scratch)
        save(results, aside / RESULTS)
        figures = [path.name for path in draw(results, aside / FIGURES)]
        (aside / REPORT).write_text(render(results, [f"{FIGURES}/{name}" for name in figures]), encoding="utf-8")
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
