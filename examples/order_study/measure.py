"""Measure the models of a study, from what is saved and nothing else; what was measured before is read back."""

import time
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
from tqdm import tqdm

from order_study.cache import Entry, Key, What, read_entry, write_entry
from order_study.catalogue import Model
from order_study.digests import model_digest, samples_digest, weights_digest
from order_study.exact_match import exact, right_numbers
from order_study.material import Material
from order_study.measurements import Measured, SampleLosses
from order_study.model_measures import Task, measure_model
from order_study.parallel import each
from order_study.settings import Study
from order_study.tokens import Sample
from order_study.training import on_cpu

LOSSES = "losses"

Samples = Mapping[What, Sequence[Sample]]


def measure_all(
    study: Study,
    root: Path,
    models: Sequence[Model],
    material: Material,
    report: Callable[[str], None],
    jobs: int = 1,
) -> list[Measured]:
    """Measure all models of a study.

    Args:
        study: The settings.
        root: The folder of the study, where all models are.
        models: Those to measure.
        material: What they are measured with.
        report: Takes one line at a time.
        jobs: How many models are measured at the same time, each in a process of its own.

    Raises:
        StudyError: A model cannot be read, its loss is not finite, or exact match is asked of responses without a
            number.
    """
    samples, right = _samples(study, material)
    keys = _keys(study, root, models, material, samples)
    tasks = _missing(root, models, material, samples, keys)
    began = time.monotonic()
    with tqdm(total=len(tasks), desc="measuring", unit="model", leave=False, disable=None) as bar:
        for _ in each(measure_model, [(task,) for task in tasks], jobs):
            bar.update()
    if tasks:
        report(f"{root / LOSSES}: {len(tasks)} models measured in {time.monotonic() - began:.0f} s")
    else:
        report(f"{root / LOSSES}: reused")
    return [_measured(root, model, keys[model], right) for model in models]


def _samples(study: Study, material: Material) -> tuple[Samples, list[Decimal]]:
    """The samples of each measurement, and the right answers of exact match."""
    measuring = study.measuring
    samples: dict[What, Sequence[Sample]] = {
        "held_out": material.held_out,
        "training": material.fine_tuning[: measuring.training_samples],
    }
    if measuring.exact_match is None:
        return samples, []
    number = measuring.exact_match.samples
    samples["exact_match"] = material.held_out[:number]
    return samples, right_numbers(material.responses[:number])


def _keys(
    study: Study, root: Path, models: Sequence[Model], material: Material, samples: Samples
) -> dict[Model, list[Key]]:
    """What is measured of each model, with all that decides the outcome."""
    exact_match = study.measuring.exact_match
    base_sha256 = weights_digest(material.base)
    samples_sha256 = {what: samples_digest(some) for what, some in samples.items()}
    keys: dict[Model, list[Key]] = {}
    for model in models:
        model_sha256 = model_digest(root / model.folder)
        keys[model] = [
            Key(
                what=what,
                model_sha256=model_sha256,
                other_sha256=samples_sha256[what],
                batch_size=study.measuring.batch_size,
                max_new_tokens=exact_match.max_new_tokens if exact_match and what == "exact_match" else 0,
                threads=study.threads,
                device="cpu" if on_cpu(study.device) else "cuda",
            )
            for what in samples
            if what == "held_out" or model.step is None  # of intermediate states only a curve of loss is drawn
        ]
        if model.kind != "base":
            keys[model].append(Key(what="weights", model_sha256=model_sha256, other_sha256=base_sha256))
    return keys


def _missing(
    root: Path,
    models: Sequence[Model],
    material: Material,
    samples: Samples,
    keys: Mapping[Model, Sequence[Key]],
) -> list[Task]:
    """What is still to be measured; models that are the same are measured once.

    Some always are: with K sub-models, K - 1 rounds of resampling and any more give the same merge.
    """
    found: dict[Key, Entry] = {}
    lacking: dict[Key, list[Path]] = {}
    holder: dict[Key, Model] = {}
    for model in models:
        for key in keys[model]:
            file = _file(root, model, key)
            entry = read_entry(file, key)
            if entry is None:
                lacking.setdefault(key, []).append(file)
                holder.setdefault(key, model)
            else:
                found[key] = entry
    missing: dict[Model, list[tuple[Key, Sequence[Sample], list[Path]]]] = {}
    for key, files in lacking.items():
        if key in found:
            for file in files:
                write_entry(file, found[key])
        else:
            missing.setdefault(holder[key], []).append((key, samples.get(key.what, ()), files))
    return [Task(root / model.folder, material.base, material.context, some) for model, some in missing.items()]


def _measured(root: Path, model: Model, keys: Sequence[Key], right: Sequence[Decimal]) -> Measured:
    entries = {key.what: read_entry(_file(root, model, key), key) for key in keys}
    answers = entries.get("exact_match")
    weights = entries.get("weights")
    return Measured(
        name=model.name,
        kind=model.kind,
        seed=model.seed,
        rounds=model.rounds,
        step=model.step,
        held_out=_losses(entries["held_out"]),
        training=_losses(entries["training"]) if "training" in entries else None,
        exact=np.array(exact(answers.answers or (), right)) if answers else None,
        equal_to_base=weights.equal_to_base if weights else None,
    )


def _losses(entry: Entry | None) -> SampleLosses:
    assert entry is not None  # it was read, or written just before
    return SampleLosses(total=np.array(entry.total), tokens=np.array(entry.tokens))


def _file(root: Path, model: Model, key: Key) -> Path:
    return root / LOSSES / model.place / f"{key.what}.json"
