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
from examples.order_study.measure.answers import answers, prompt_of, right_numbers
from examples.order_study.measure.answers import exact as right_answers
from examples.order_study.measure.losses import load_model, sample_losses
from examples.order_study.measure.weights import compare
from examples.order_study.measured import Measured, SampleLosses, finite
from examples.order_study.model import Model, drawn, read_from
from examples.order_study.parallel import each
from examples.order_study.settings import BASE, ENSEMBLE, Study
from examples.order_study.shared import shared_prefix
from examples.order_study.store.folders import digest, model_digest, weights_digest, write_whole
from examples.order_study.store.places import LOSSES, MODELS
from examples.order_study.train.models import Trained
from examples.order_study.train.trainer import on_cpu, reproducible

What = Literal["validation", "held_out", "training", "exact_match", "weights"]
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
    shared_prefix: bool = False
    program: int = 2  # raised when a change to the program changes what it measures


@dataclass(frozen=True)
class _Task:
    """What is missing of one model: each measurement with its samples and the files that it goes to."""

    folder: Path
    read: Sequence[Path]  # the folder, or those of an ensemble's models
    base: Path
    context: int
    missing: Sequence[tuple[Key, Sequence[Sample], Sequence[Path]]]


@dataclass(frozen=True)
class Measurer:
    """Measures models of a study, `jobs` of them at the same time, each in a process of its own, or on Ray.

    All methods raise a StudyError where a model cannot be read, or its loss is not finite.
    """

    study: Study
    root: Path
    trained: Trained
    report: Callable[[str], None]
    jobs: int = 1
    ray: str | None = None

    def measured(self, models: Sequence[Model]) -> list[Measured]:
        """All that is measured of each model.

        Raises:
            StudyError: Exact match is asked of responses without a number.
        """
        samples, right = _samples(self.study, self.trained)
        keys = self._made({model: _wanted(self.study, model, samples) for model in models}, samples)
        return [_measured(self.study, self.root, model, keys[model], right) for model in models]

    def validation_losses(self, models: Sequence[Model]) -> list[float]:
        """The mean loss of each model on the samples for validation, in nats per token."""
        entries = self._entries("validation", models)
        return [finite(model, _losses(entry)).mean() for model, entry in zip(models, entries, strict=True)]

    def distances(self, models: Sequence[Model]) -> list[float]:
        """How far each model is from the base: the Euclidean norm over all parameters."""
        return [float(entry["distance"]) for entry in self._entries("weights", models)]

    def _entries(self, what: What, models: Sequence[Model]) -> list[Entry]:
        """One measurement of each model."""
        keys = self._made({model: [what] for model in models}, _samples(self.study, self.trained)[0])
        return [_read(_file(self.root, model, key), key) or {} for model in models for key in keys[model]]

    def _made(
        self, wanted: Mapping[Model, Sequence[What]], samples: Mapping[What, Sequence[Sample]]
    ) -> dict[Model, list[Key]]:
        """Have on disk what is wanted of each model; return the key of each measurement."""
        keys = _keys(self.study, self.root, wanted, samples)
        tasks = _missing(self.study, self.root, self.trained.context, samples, keys)
        began = time.monotonic()
        done = each(_measure, [(task,) for task in tasks], self.jobs, cluster=self.ray, threads=self.study.threads)
        for number, ((task,), seconds) in enumerate(done, start=1):
            left = (time.monotonic() - began) / number * (len(tasks) - number)
            self.report(f"{task.folder}: measured in {seconds:.0f} s, {number} of {len(tasks)}, {left:.0f} s left")
        if not tasks:
            self.report(f"{self.root / LOSSES}: reused")
        return keys


def _samples(study: Study, trained: Trained) -> tuple[Mapping[What, Sequence[Sample]], list[Decimal]]:
    """The samples of each measurement, and the right answers of exact match where these are numbers."""
    held_out, measuring = trained.samples["held_out"], study.measuring
    samples: dict[What, Sequence[Sample]] = {
        "held_out": held_out.samples,
        "training": trained.samples["fine_tuning"].samples[: measuring.training_samples],
    }
    if "validation" in trained.samples:
        samples["validation"] = trained.samples["validation"].samples
    if measuring.exact_match is None or measuring.exact_match.of == "response":
        return samples, []
    number = measuring.exact_match.samples
    samples["exact_match"] = held_out.samples[:number]
    return samples, right_numbers(held_out.responses[:number])


def _wanted(study: Study, model: Model, samples: Mapping[What, Sequence[Sample]]) -> list[What]:
    """What is measured of a model: of a state on the way, no more than a curve of loss needs."""
    wanted: list[What] = ["held_out"]
    if model.step is None and (model.kind == "sub-model" or model in drawn(study)):
        wanted.append("training")
    if model.step is None and model.kind == "sub-model" and "validation" in samples:
        wanted.append("validation")
    if model.control == ENSEMBLE:
        return wanted
    if model.step is None and "exact_match" in samples:
        wanted.append("exact_match")
    return [*wanted, "weights"] if model.kind != "base" else wanted


def _keys(
    study: Study, root: Path, wanted: Mapping[Model, Sequence[What]], samples: Mapping[What, Sequence[Sample]]
) -> dict[Model, list[Key]]:
    """What is measured of each model, with all that decides the outcome."""
    measuring = study.measuring
    tokens = measuring.exact_match.max_new_tokens if measuring.exact_match else 0
    base_sha256 = weights_digest(root / MODELS / BASE)
    samples_sha256 = {what: digest([list(sample.values()) for sample in some]) for what, some in samples.items()}
    keys: dict[Model, list[Key]] = {}
    for model, every in wanted.items():
        read = [model_digest(root / one.folder) for one in read_from(model, study)]
        model_sha256 = read[0] if len(read) == 1 else digest(read)
        keys[model] = [
            Key(what=what, model_sha256=model_sha256, other_sha256=base_sha256)
            if what == "weights"
            else Key(
                what=what,
                model_sha256=model_sha256,
                other_sha256=samples_sha256[what],
                batch_size=measuring.batch_size,
                max_new_tokens=tokens if what == "exact_match" else 0,
                threads=study.threads,
                device="cpu" if on_cpu(study.device) else "cuda",
                precision=measuring.precision or "fp32",
                shared_prefix=study.shared_prefix and what != "exact_match",
            )
            for what in every
        ]
    return keys


def _missing(
    study: Study,
    root: Path,
    context: int,
    samples: Mapping[What, Sequence[Sample]],
    keys: Mapping[Model, Sequence[Key]],
) -> list[_Task]:
    """What is still to be measured; models that are the same are measured once.

    Some always are: with K sub-models, K - 1 rounds of resampling and any more give the same merge.
    """
    found: dict[Key, Entry] = {}
    lacking: dict[Key, list[Path]] = {}
    holder: dict[str, Model] = {}  # by the digest of its weights: the first of those that are the same
    for model, every in keys.items():
        for key in every:
            file = _file(root, model, key)
            entry = _read(file, key)
            if entry is None:
                lacking.setdefault(key, []).append(file)
                holder.setdefault(key.model_sha256, model)
            else:
                found[key] = entry
    missing: dict[Model, list[tuple[Key, Sequence[Sample], list[Path]]]] = {}
    for key, files in lacking.items():
        if key in found:
            _write(files, key, found[key])
        else:
            missing.setdefault(holder[key.model_sha256], []).append((key, samples.get(key.what, ()), files))
    return [
        _Task(
            folder=root / model.folder,
            read=[root / one.folder for one in read_from(model, study)],
            base=root / MODELS / BASE,
            context=context,
            missing=some,
        )
        for model, some in missing.items()
    ]


def _measure(task: _Task) -> float:
    """Make all measurements of a task, each on disk as soon as it is made; return how long it took."""
    began = time.monotonic()

    @functools.cache
    def models(device: str, precision: str) -> list[PreTrainedModel]:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return [load_model(folder, torch.device(device), dtype) for folder in task.read]

    for key, samples, files in task.missing:
        if key.what == "weights":
            equal, distance = compare(task.folder, task.base)
            _write(files, key, {"equal_to_base": equal, "distance": distance})
        else:
            with reproducible(key.threads):
                _write(files, key, _entry(task, key, samples, models(key.device, key.precision)))
    return time.monotonic() - began


def _entry(task: _Task, key: Key, samples: Sequence[Sample], models: Sequence[PreTrainedModel]) -> Entry:
    if key.what == "exact_match":
        prompts = [prompt_of(sample) for sample in samples]
        tokenizer = load_tokenizer(task.folder)
        return {"answers": answers(models[0], tokenizer, prompts, key.max_new_tokens, task.context, key.batch_size)}
    prefix = shared_prefix(samples) if key.shared_prefix else ()
    losses = sample_losses(models, samples, key.batch_size, prefix)
    return {name: column.tolist() for name, column in vars(losses).items()}


def _measured(study: Study, root: Path, model: Model, keys: Sequence[Key], right: Sequence[Decimal]) -> Measured:
    entries = {key.what: _read(_file(root, model, key), key) or {} for key in keys}
    losses = {what: _losses(entries[what]) for what in ("held_out", "training", "validation") if what in entries}
    exact_match = study.measuring.exact_match
    exact = None
    if exact_match is not None and exact_match.of == "response" and model.step is None:
        exact = losses["held_out"].right
        assert exact is not None  # measured along with every loss
        exact = exact[: exact_match.samples]
    elif "exact_match" in entries:
        exact = np.array(right_answers(entries["exact_match"]["answers"], right))
    weights = entries.get("weights", {})
    return Measured(
        model=model,
        held_out=losses["held_out"],
        training=losses.get("training"),
        validation=losses.get("validation"),
        exact=exact,
        equal_to_base=weights.get("equal_to_base"),
        distance=weights.get("distance"),
    )


def _losses(entry: Entry) -> SampleLosses:
    return SampleLosses(*(np.array(entry[name]) for name in ("total", "tokens", "right")))


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
