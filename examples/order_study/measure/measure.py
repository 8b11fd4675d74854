"""Measure the models of a study, from what is saved and nothing else; what was measured before is read back.

Each measurement is a file of JSON beside the key of what it was measured from; one with another key is made anew.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from examples.order_study.data.samples import Sample, load_tokenizer
from examples.order_study.measure.answers import answers, exact, prompt_of, right_numbers
from examples.order_study.measure.losses import load_model, sample_losses
from examples.order_study.measure.weights import share_equal
from examples.order_study.measured import Measured, SampleLosses
from examples.order_study.model import Model
from examples.order_study.parallel import each
from examples.order_study.settings import BASE, Study
from examples.order_study.store.folders import digest, model_digest, weights_digest, write_whole
from examples.order_study.store.places import LOSSES, MODELS
from examples.order_study.train.models import Trained
from examples.order_study.train.trainer import on_cpu, reproducible

What = Literal["held_out", "training", "exact_match", "weights"]
Entry = Mapping[str, Any]  # what was measured, beside its key


@dataclass(frozen=True)
class Key:
    """All that a measurement depends on."""

    what: What
    model_sha256: str
    other_sha256: str  # of the samples, or of the base that the weights are compared with
    batch_size: int = 0  # what follows decides nothing for weights
    max_new_tokens: int = 0
    threads: int = 0
    device: str = ""
    precision: str = "fp32"
    program: int = 1  # raised when a change to the program changes what it measures


@dataclass(frozen=True)
class _Task:
    """What is missing of one model: each measurement with its samples and the files that it goes to."""

    folder: Path
    base: Path
    context: int
    missing: Sequence[tuple[Key, Sequence[Sample], Sequence[Path]]]


def measure_all(
    study: Study,
    root: Path,
    models: Sequence[Model],
    trained: Trained,
    report: Callable[[str], None],
    jobs: int = 1,
    ray: str | None = None,
) -> list[Measured]:
    """Measure all models of a study, `jobs` of them at the same time, each in a process of its own, or on Ray.

    Raises:
        StudyError: A model cannot be read, its loss is not finite, or exact match is asked of responses without a
            number.
    """
    samples, right = _samples(study, trained)
    keys = _keys(study, root, models, samples)
    tasks = _missing(root, models, trained.context, samples, keys)
    began = time.monotonic()
    measured = each(_measure, [(task,) for task in tasks], jobs, cluster=ray, threads=study.threads)
    for number, ((task,), seconds) in enumerate(measured, start=1):
        left = (time.monotonic() - began) / number * (len(tasks) - number)
        report(f"{task.folder}: measured in {seconds:.0f} s, {number} of {len(tasks)}, {left:.0f} s left")
    if not tasks:
        report(f"{root / LOSSES}: reused")
    return [_measured(root, model, keys[model], right) for model in models]


def _samples(study: Study, trained: Trained) -> tuple[Mapping[What, Sequence[Sample]], list[Decimal]]:
    """The samples of each measurement, and the right answers of exact match."""
    held_out, measuring = trained.samples["held_out"], study.measuring
    samples: dict[What, Sequence[Sample]] = {
        "held_out": held_out.samples,
        "training": trained.samples["fine_tuning"].samples[: measuring.training_samples],
    }
    if measuring.exact_match is None:
        return samples, []
    number = measuring.exact_match.samples
    samples["exact_match"] = held_out.samples[:number]
    return samples, right_numbers(held_out.responses[:number])


def _keys(
    study: Study, root: Path, models: Sequence[Model], samples: Mapping[What, Sequence[Sample]]
) -> dict[Model, list[Key]]:
    """What is measured of each model, with all that decides the outcome."""
    measuring = study.measuring
    tokens = measuring.exact_match.max_new_tokens if measuring.exact_match else 0
    base_sha256 = weights_digest(root / MODELS / BASE)
    samples_sha256 = {what: digest([list(sample.values()) for sample in some]) for what, some in samples.items()}
    keys: dict[Model, list[Key]] = {}
    for model in models:
        model_sha256 = model_digest(root / model.folder)
        keys[model] = [
            Key(
                what=what,
                model_sha256=model_sha256,
                other_sha256=samples_sha256[what],
                batch_size=measuring.batch_size,
                max_new_tokens=tokens if what == "exact_match" else 0,
                threads=study.threads,
                device="cpu" if on_cpu(study.device) else "cuda",
                precision=measuring.precision or "fp32",
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
    context: int,
    samples: Mapping[What, Sequence[Sample]],
    keys: Mapping[Model, Sequence[Key]],
) -> list[_Task]:
    """What is still to be measured; models that are the same are measured once.

    Some always are: with K sub-models, K - 1 rounds of resampling and any more give the same merge.
    """
    found: dict[Key, Entry] = {}
    lacking: dict[Key, list[Path]] = {}
    holder: dict[Key, Model] = {}
    for model in models:
        for key in keys[model]:
            file = _file(root, model, key)
            entry = _read(file, key)
            if entry is None:
                lacking.setdefault(key, []).append(file)
                holder.setdefault(key, model)
            else:
                found[key] = entry
    missing: dict[Model, list[tuple[Key, Sequence[Sample], list[Path]]]] = {}
    for key, files in lacking.items():
        if key in found:
            _write(files, key, found[key])
        else:
            missing.setdefault(holder[key], []).append((key, samples.get(key.what, ()), files))
    return [_Task(root / model.folder, root / MODELS / BASE, context, some) for model, some in missing.items()]


def _measure(task: _Task) -> float:
    """Make all measurements of a task, each on disk as soon as it is made; return how long it took."""
    began = time.monotonic()

    @functools.cache
    def model(device: str, precision: str) -> PreTrainedModel:
        return load_model(task.folder, torch.device(device), torch.bfloat16 if precision == "bf16" else torch.float32)

    for key, samples, files in task.missing:
        if key.what == "weights":
            _write(files, key, {"equal_to_base": share_equal(task.folder, task.base)})
        else:
            with reproducible(key.threads):
                _write(files, key, _entry(task, key, samples, model(key.device, key.precision)))
    return time.monotonic() - began


def _entry(task: _Task, key: Key, samples: Sequence[Sample], model: PreTrainedModel) -> Entry:
    if key.what == "exact_match":
        prompts = [prompt_of(sample) for sample in samples]
        tokenizer = load_tokenizer(task.folder)
        return {"answers": answers(model, tokenizer, prompts, key.max_new_tokens, task.context, key.batch_size)}
    losses = sample_losses(model, samples, key.batch_size)
    return {"total": losses.total.tolist(), "tokens": losses.tokens.tolist()}


def _measured(root: Path, model: Model, keys: Sequence[Key], right: Sequence[Decimal]) -> Measured:
    entries = {key.what: _read(_file(root, model, key), key) or {} for key in keys}

    def losses(what: What) -> SampleLosses | None:
        entry = entries.get(what)
        return None if entry is None else SampleLosses(np.array(entry["total"]), np.array(entry["tokens"]))

    held_out = losses("held_out")
    assert held_out is not None  # it was read, or written just before
    return Measured(
        model=model,
        held_out=held_out,
        training=losses("training"),
        exact=np.array(exact(entries["exact_match"]["answers"], right)) if "exact_match" in entries else None,
        equal_to_base=entries.get("weights", {}).get("equal_to_base"),
    )


def _file(root: Path, model: Model, key: Key) -> Path:
    return root / LOSSES / model.place / f"{key.what}.json"


def _read(file: Path, key: Key) -> Entry | None:
    """The measurement in a file, or None where there is none with that key."""
    try:
        entry: Entry = json.loads(file.read_bytes())
        return entry if entry["key"] == asdict(key) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write(files: Sequence[Path], key: Key, entry: Entry) -> None:
    # A loss that is not a number comes back from this JSON as such, and is then reported by its model's name.
    for file in files:
        write_whole(file, json.dumps({**entry, "key": asdict(key)}).encode() + b"\n")
