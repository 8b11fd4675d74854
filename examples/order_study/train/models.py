"""Train the models of a study, base first; finished ones are reused, and one that was cut off is resumed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from examples.order_study import parallel
from examples.order_study.data.parts import Example, Parts, describe, examples_digest
from examples.order_study.data.samples import (
    Sample,
    Samples,
    context_length,
    encode,
    encode_part,
    load_tokenizer,
)
from examples.order_study.model import trained
from examples.order_study.settings import BASE, GivenBase, Part, Run, Study, Training
from examples.order_study.store.disk import writing_to
from examples.order_study.store.folders import digest, discard, is_made, read_record, weights_digest
from examples.order_study.store.places import MODELS, STEPS
from examples.order_study.train import trainer
from examples.order_study.train.checkpoints import save, trained_card
from examples.order_study.train.given import given_from, save_given
from examples.order_study.train.lora import adapted
from examples.order_study.train.states import States, folder_of
from examples.quickstart.train import train_tokenizer

Report = Callable[[str], None]

_PROGRAM = 3  # raised when a change to the program changes the models it makes


@dataclass(frozen=True)
class Trained:
    """What the rest of a study needs to know of its training."""

    samples: Mapping[Part, Samples]
    steps: tuple[int, ...]  # after which a state of each sub-model was saved
    context: int  # tokens that the models can see at once


@dataclass(frozen=True)
class _Task:
    """The training of one model, as a process of its own is told of it."""

    models: Path
    run: Run
    made_from: dict[str, Any]
    steps: tuple[int, ...]  # whose states are saved as models too
    text: str  # what it is trained on, for the card
    passages: tuple[str, ...] = ()  # of a fresh base, which has no tokenizer yet
    samples: tuple[Sample, ...] = ()  # of a sub-model

    @property
    def folder(self) -> Path:
        return self.models / self.run.name

    def state(self, step: int) -> tuple[Path, dict[str, Any]]:
        """Where the state after a step is kept, and what it is made from."""
        return self.models / STEPS / f"{step:06}" / self.run.name, {**self.made_from, "step": step}

    def missing(self) -> list[int]:
        return [step for step in self.steps if not is_made(*self.state(step))]


def train_models(
    study: Study, root: Path, parts: Parts, report: Report, jobs: int = 1, ray: str | None = None
) -> Trained:
    """Have base and sub-models of a study in `root`; `report` is told what was done for each.

    `jobs` sub-models are trained at the same time, or as many as a Ray cluster has room for; no bit depends on it.

    Raises:
        StudyError: The data cannot be used, a folder belongs to someone else, or the disk is full.
    """
    models = root / MODELS
    with writing_to(root):
        for model in trained(study):
            read_record(root / model.folder)  # before anything is trained, what is someone else's is refused
        _ensure_base(study, models, parts, report)
    tokenizer = load_tokenizer(models / BASE)
    context = context_length(AutoConfig.from_pretrained(models / BASE), tokenizer)
    samples = encode(parts, study.data, tokenizer, context)
    for part, some in samples.items():
        if some.left_out:
            limit = getattr(study.data, "max_tokens", None) or context
            report(
                f"{models}: {some.left_out} of {some.left_out + len(some.samples)} samples of the {part} part are left "
                f"out, as they have more than {min(limit, context)} tokens"
            )
    steps = kept_steps(study, len(samples["fine_tuning"].samples))
    waiting = [(task,) for task in _sub_tasks(study, models, samples["fine_tuning"], steps) if not _done(task, report)]
    began, length = time.monotonic(), sum(_length(task) for (task,) in waiting)
    finished = 0
    for (task,), note in parallel.each(_train, waiting, jobs, cluster=ray, threads=study.threads):
        finished += _length(task)
        left = (time.monotonic() - began) / finished * (length - finished)
        report(f"{task.folder}: {note}" + (f"; about {_duration(left)} of training left" if left else ""))
    return Trained(samples, steps, context)


def kept_steps(study: Study, samples: int) -> tuple[int, ...]:
    """The steps after which a state of each sub-model is saved as a model, evenly spaced."""
    total = study.fine_tuning.steps(samples)
    steps = {round(total * number / (study.checkpoints + 1)) for number in range(1, study.checkpoints + 1)}
    return tuple(sorted(steps - {0, total}))


def _ensure_base(study: Study, models: Path, parts: Parts, report: Report) -> None:
    folder, run = models / BASE, study.base_run()
    if run is None:
        assert isinstance(study.base, GivenBase)
        made_from = given_from(study.base, study.fine_tuning.saved_as, folder)
    else:
        made_from = _made_from(run, text_sha256=examples_digest(parts["base"]))
    record = read_record(folder)
    if record is not None and record.made_from != made_from:
        # First, so that a run which is cut off leaves no sub-models of a base that is gone.
        for file in models.glob("[!.]*"):
            if file.name not in (BASE, STEPS) and read_record(file):
                _discard(models, file.name)
        discard(folder)
    if run is not None:
        passages = tuple(one.response for one in parts["base"])
        task = _Task(models, run, made_from, (), describe(study.data, "base"), passages)
        if not _done(task, report):
            report(f"{folder}: {_train(task)}")
    elif is_made(folder, made_from):
        report(f"{folder}: reused")
    else:
        assert isinstance(study.base, GivenBase)
        save_given(folder, study.base, study.fine_tuning.saved_as, made_from)
        report(f"{folder}: saved from {study.base.model}")


def _sub_tasks(study: Study, models: Path, part: Samples, steps: tuple[int, ...]) -> list[_Task]:
    start, text = weights_digest(models / BASE), digest([list(sample.values()) for sample in part.samples])
    states = {one.name for one in trained(study) if one.kind == "sub-model"}
    tasks = []
    for run in study.sub_runs():
        made_from = _made_from(run, text_sha256=text, start_sha256=start)
        record = read_record(models / run.name)
        if record is not None and record.made_from != made_from:
            _discard(models, run.name)
        kept = steps if run.name in states else ()
        tasks.append(
            _Task(models, run, made_from, kept, describe(study.data, "fine_tuning"), samples=tuple(part.samples))
        )
    return tasks


def _made_from(run: Run, **digests: str) -> dict[str, Any]:
    # Settings as JSON gives them back, without the one that decides nothing about the result.
    return {"program": _PROGRAM, "run": run.model_dump(mode="json", exclude={"training": {"save_steps"}}), **digests}


def _discard(models: Path, name: str) -> None:
    for folder in (*(models / STEPS).glob(f"*/{name}"), models / name):
        discard(folder)


def _done(task: _Task, report: Report) -> bool:
    if not is_made(task.folder, task.made_from) or task.missing():
        return False
    report(f"{task.folder}: reused")
    discard(folder_of(task.folder))  # of a process killed between saving the model and clearing up
    return True


def _length(task: _Task) -> int:
    """How long a training is beside others: samples seen."""
    return task.run.training.steps(len(task.samples)) * task.run.training.batch_size


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _train(task: _Task) -> str:
    """Train one model and save it; say how long that took."""
    run, began = task.run, time.monotonic()
    saved_as = run.training.saved_as
    with writing_to(task.folder):
        model, tokenizer, samples = _start(task)
        states = States(task.folder, task.made_from, run.training.save_steps)

        def keep(state: PreTrainedModel, step: int) -> None:
            save(
                task.state(step)[0], state, tokenizer, saved_as, task.state(step)[1], trained_card(run, task.text, step)
            )

        resumed, curve = trainer.train(model, samples, tokenizer, run, states, task.missing(), keep)
        save(task.folder, model, tokenizer, saved_as, task.made_from, trained_card(run, task.text), curve)
        discard(states.folder)
    note = f"trained in {time.monotonic() - began:.0f} s"
    return f"{note}, resumed after step {resumed}" if resumed else note


def _start(task: _Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Sample]]:
    training, architecture = task.run.training, task.run.architecture
    dtype = trainer.weights_dtype(training.precision)
    model: PreTrainedModel
    if architecture is not None:
        context = architecture.max_position_embeddings
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(task.passages, architecture.vocab_size, context)
        model = trainer.fresh_model(architecture, tokenizer, training.seed)
        torch.nn.Module.to(model, dtype)  # past an annotation that asks for a model
        examples = [Example("", passage) for passage in task.passages]
        return model, tokenizer, encode_part("base", examples, tokenizer, context).samples
    # The base as it was saved: what a sub-model starts from is, bit for bit, what it is compared with later.
    start = task.models / BASE
    config = AutoConfig.from_pretrained(start)
    dropout = getattr(config, "attention_dropout", None)
    if training.attention_dropout:
        config.attention_dropout = training.attention_dropout
    model = AutoModelForCausalLM.from_pretrained(start, local_files_only=True, dtype=dtype, config=config)
    if training.attention_dropout:
        model.config.attention_dropout = dropout  # the layers have it by now; what is saved is configured as the base
    if training.noise:
        _add_noise(model, training)
    return adapted(model, training), load_tokenizer(start), list(task.samples)


def _add_noise(model: PreTrainedModel, training: Training) -> None:
    """Add normal numbers of the training seed to all weights, in proportion to the spread of each tensor."""
    generator = torch.Generator().manual_seed(training.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.float().std(correction=0))
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * (training.noise * spread))
