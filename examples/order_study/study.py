"""Train the models of a study, base first; finished ones are reused, and one that was cut off is resumed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from order_study import checkpoints, parallel
from order_study.bases import given_origin, save_given
from order_study.checkpoints import GivenOrigin, Origin
from order_study.digests import weights_digest
from order_study.disk import writing_to
from order_study.evaluation import load_tokenizer
from order_study.example import digest
from order_study.folders import discard
from order_study.lora import adapted
from order_study.parts import Parts, ensure_parts, read_part
from order_study.samples import TEXT_FOLDER as TEXT_FOLDER
from order_study.samples import Counts, encode_some, encoded_part, ensure_counts, read_counts
from order_study.settings import BASE, GivenBase, Part, Run, Study
from order_study.sources import HubDataset, Text
from order_study.states import States, folder_of
from order_study.tokens import Sample, train_tokenizer
from order_study.training import Snapshots, fresh_model, train, weights_dtype

STEPS_FOLDER = "steps"

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Task:
    """The training of one model, as a process of its own is told of it."""

    study: Study
    run: Run
    models: Path
    origin: Origin
    steps: tuple[int, ...]  # whose states are saved as models too


def train_study(study: Study, out: Path, report: Report, jobs: int = 1) -> None:
    """Have text, base and sub-models of a study in `out`; `report` is told what was done for each model.

    `jobs` sub-models are trained at the same time, which does not change their bits.

    Raises:
        StudyError: The data cannot be used, a folder belongs to someone else, or the disk is full.
    """
    out.mkdir(parents=True, exist_ok=True)
    with writing_to(out):
        parts = ensure_parts(out / TEXT_FOLDER, study)
        origin = _base_origin(study, parts, out)
        # Before anything is trained: a run that is cut off must not leave sub-models of a base that is gone.
        for name in _outdated(study, origin, parts, out):
            for folder in (*_steps_of(out, name), out / name):
                discard(folder)
    _ensure_base(study, origin, out, report)
    with writing_to(out):
        counts = ensure_counts(out, parts)
    for part, left_out in counts.left_out.items():
        if left_out:
            report(
                f"{out / TEXT_FOLDER}: {len(left_out)} of {len(left_out) + counts.samples[part]} samples of the {part} "
                f"part are left out, as they have more than the {counts.context} tokens of the context"
            )
    steps = _kept_steps(study, counts)
    start = weights_digest(out / BASE)
    tasks = [
        _Task(study, run, out, Origin(run=run, text_sha256=digest(parts[run.part]), start_sha256=start), steps)
        for run in study.sub_runs()
    ]
    waiting = [(task,) for task in tasks if not _finished(task, report)]
    for (task,), note in parallel.each(_train, waiting, jobs):
        report(f"{task.models / task.run.name}: {note}")


def kept_steps(study: Study, models: Path) -> tuple[int, ...]:
    """The steps after which a state of each sub-model was saved as a model, in `steps/<step>/<name>`.

    Raises:
        StudyError: The study has not been trained in `models`.
    """
    return _kept_steps(study, read_counts(models))


def step_folder(models: Path, step: int) -> Path:
    """The folder of the sub-models' states after a step."""
    return models / STEPS_FOLDER / f"{step:06d}"


def _kept_steps(study: Study, counts: Counts) -> tuple[int, ...]:
    total = study.fine_tuning.epochs * math.ceil(counts.samples["fine_tuning"] / study.fine_tuning.batch_size)
    steps = {round(total * number / (study.checkpoints + 1)) for number in range(1, study.checkpoints + 1)}
    return tuple(sorted(steps - {0, total}))


def _base_origin(study: Study, parts: Parts, out: Path) -> Origin | GivenOrigin:
    if isinstance(study.base, GivenBase):
        return given_origin(study.base, study.fine_tuning.saved_as, out / BASE)
    run = study.base_run()
    assert run is not None  # as for every base that is not given
    return Origin(run=run, text_sha256=digest(parts[run.part]), start_sha256=None)


def _ensure_base(study: Study, origin: Origin | GivenOrigin, out: Path, report: Report) -> None:
    folder = out / BASE
    if isinstance(origin, Origin):
        task = _Task(study, origin.run, out, origin, ())
        if not _finished(task, report):
            report(f"{folder}: {_train(task)}")
    elif checkpoints.is_finished(folder, origin):
        report(f"{folder}: reused")
    else:
        with writing_to(folder):
            save_given(folder, origin)
        report(f"{folder}: saved from {origin.model}")


def _outdated(study: Study, origin: Origin | GivenOrigin, parts: Parts, out: Path) -> list[str]:
    names = [BASE] if checkpoints.is_outdated(out / BASE, origin) else []
    for run in study.sub_runs():
        wanted = Origin(run=run, text_sha256=digest(parts[run.part]), start_sha256=None)
        if checkpoints.is_outdated(out / run.name, wanted) or BASE in names:
            names.append(run.name)
    return names


def _finished(task: _Task, report: Report) -> bool:
    folder = task.models / task.run.name
    finished = checkpoints.is_finished(folder, task.origin) and not _missing(task)
    if finished:
        report(f"{folder}: reused")
        discard(folder_of(folder))  # of a process killed between saving the model and clearing up
    return finished


def _missing(task: _Task) -> list[int]:
    return [
        step
        for step in task.steps
        if not checkpoints.is_finished(step_folder(task.models, step) / task.run.name, task.origin, step)
    ]


def _train(task: _Task) -> str:
    """Train one model and save it; say how long that took."""
    folder, run = task.models / task.run.name, task.run
    began = time.monotonic()
    with writing_to(folder):
        model, tokenizer, samples = _start(task)
        missing = _missing(task)
        states = States(folder, task.origin, _save_steps(task))

        def save(trained: PreTrainedModel, step: int) -> None:
            kept = step_folder(task.models, step) / run.name
            checkpoints.save(kept, trained, tokenizer, task.origin, _describe(task.study, run.part), step)

        resumed = train(model, samples, tokenizer, run, states, Snapshots(missing, save))
        checkpoints.save(folder, model, tokenizer, task.origin, _describe(task.study, run.part))
        discard(states.folder)
    note = f"trained in {time.monotonic() - began:.0f} s"
    return f"{note}, resumed after step {resumed}" if resumed else note


def _start(task: _Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Sample]]:
    training, architecture = task.run.training, task.run.architecture
    model: PreTrainedModel
    if architecture is not None:
        examples = read_part(task.models / TEXT_FOLDER, task.run.part)
        context = architecture.max_position_embeddings
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(
            (one.response for one in examples), architecture.vocab_size, context
        )
        model = fresh_model(architecture, tokenizer, training.seed)
        torch.nn.Module.to(model, weights_dtype(training.precision))  # past an annotation that asks for a model
        return model, tokenizer, encode_some(task.run.part, examples, tokenizer, context).samples
    # The base as it was saved: what a sub-model starts from is, bit for bit, what it is compared with later.
    start = task.models / BASE
    model = AutoModelForCausalLM.from_pretrained(start, local_files_only=True, dtype=weights_dtype(training.precision))
    return adapted(model, training), load_tokenizer(start), encoded_part(task.models, task.run.part).samples


def _describe(study: Study, part: Part) -> str:
    name = part.replace("_", "-")
    if isinstance(study.data, Text):
        return f"the {name} part of `pydoc_data.topics`, which every CPython carries"
    if part == "base":
        return "files named in the configuration of the study"
    if isinstance(study.data, HubDataset):
        return f"split `{study.data.train_split}` of the data set `{study.data.id}`, loss on the responses"
    return "prompts and responses named in the configuration of the study, loss on the responses"


def _save_steps(task: _Task) -> int | None:
    if task.run.name != BASE:
        return task.study.fine_tuning.save_steps
    assert not isinstance(task.study.base, GivenBase)
    return task.study.base.training.save_steps


def _steps_of(out: Path, name: str) -> list[Path]:
    return list((out / STEPS_FOLDER).glob(f"*/{name}"))
