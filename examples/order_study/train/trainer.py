"""Train one model with transformers' Trainer, in a given order of the data and reproducibly."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)

from examples.order_study.data.order import OrderedBatches
from examples.order_study.data.samples import NO_LOSS, Sample, collator
from examples.order_study.settings import Architecture, Device, Precision, Run, Training
from examples.order_study.shared import Aligned, response_logits, shared_prefix
from examples.order_study.store.disk import KEPT
from examples.order_study.train.states import States

PAUSE = 20.0  # seconds between two lines about a training

Curve = dict[str, float]
Save = Callable[[PreTrainedModel, int], None]


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Make torch repeat its bits on one kind of machine: deterministic kernels, a fixed number of threads."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, CUDA refuses deterministic products
    # Not every operation has a deterministic kernel for CUDA: there torch warns of what may differ between two runs.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])


def fresh_model(architecture: Architecture, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A Llama model in fp32 with random weights that depend on the seed alone."""
    set_seed(seed)
    config = LlamaConfig(
        **architecture.model_dump(),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def weights_dtype(precision: Precision) -> torch.dtype:
    """The dtype that the weights have in training."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def on_cpu(device: Device) -> bool:
    """Whether a run on `device` is one on the CPU here."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def train(
    model: PreTrainedModel,
    samples: list[Sample],
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    states: States,
    kept: Collection[int],
    save: Save,
) -> tuple[int, list[Curve]]:
    """Train `model` in place, from the newest state there is.

    After each of the steps `kept`, `save` is called with the model and the step.

    Returns:
        After how many steps that was, and the learning curve: for each step its loss and learning rate.
    """
    use_cache = model.config.use_cache
    states.begin()
    if run.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]  # as it is
    trainer = _OrderedTrainer(
        run=run,
        model=model,
        args=_arguments(run, str(states.folder), len(samples)),
        samples=samples,
        data_collator=Aligned(shared_prefix(samples)) if run.shared_prefix else collator(tokenizer),
        callbacks=[_Keeping(kept, save), states, _Progress(run.name)],
    )
    trainer.remove_callback(PrinterCallback)
    # No model is saved of a step that a resumed training does not come by.
    step, state = states.newest(before=min(kept, default=None))
    try:
        with reproducible(run.threads):
            trainer.train(resume_from_checkpoint=None if state is None else str(state))
    finally:
        states.leave()
    model.config.use_cache = use_cache  # the Trainer turns it off, and the saved model would generate slowly
    wanted = ("step", "loss", "learning_rate", "grad_norm")
    curve = [{name: line[name] for name in wanted} for line in trainer.state.log_history if "loss" in line]
    return step, curve


def relative_rates(training: Training, samples: int) -> NDArray[np.float64]:
    """[steps] the learning rate of each optimiser step, in units of the highest one."""
    steps = training.steps(samples)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(training.schedule, optimizer, training.warmup_steps, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return np.array(rates)


def _arguments(run: Run, scratch: str, samples: int) -> TrainingArguments:
    training = run.training
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=training.epochs,
        max_steps=-1 if training.max_steps is None else training.steps(samples),
        per_device_train_batch_size=training.batch_size // training.gradient_accumulation,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch",
        seed=training.seed,
        bf16=training.precision == "bf16_mixed",
        use_cpu=on_cpu(run.device),
        dataloader_pin_memory=False,  # of no use on a CPU, and torch warns of it
        save_strategy="no",  # `States` decides
        save_total_limit=KEPT,
        logging_steps=1,  # into the state alone, which a resumed training takes over: the learning curve
        report_to="none",
        disable_tqdm=True,  # `_Progress` says which model is trained
    )


class _OrderedTrainer(Trainer):
    """A Trainer that takes its samples in the order of a seed."""

    def __init__(self, run: Run, samples: list[Sample], **arguments: Any) -> None:
        self._run = run
        self._samples = samples
        super().__init__(train_dataset=samples, **arguments)

    def get_train_dataloader(self) -> DataLoader[Sample]:
        training = self._run.training
        loader: DataLoader[Sample] = DataLoader(
            self._samples,  # type: ignore[arg-type]  # any sequence will do, torch's annotation is narrower
            batch_sampler=OrderedBatches(
                len(self._samples),
                self._run.order,
                training.batch_size,
                self._run.composition,
                training.gradient_accumulation,
            ),
            collate_fn=self.data_collator,
        )
        # accelerate's loader is the one that tells the sampler which epoch begins.
        prepared: DataLoader[Sample] = self.accelerator.prepare(loader)
        return prepared

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        collate = self.data_collator
        if not isinstance(collate, Aligned):
            return super().compute_loss(model, inputs, *arguments, **keywords)
        logits = response_logits(model, self.accelerator.unwrap_model(model), collate.prefix, inputs)
        labels = inputs["labels"][:, 1:]
        total = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=NO_LOSS)
        items = keywords.get("num_items_in_batch")  # of all pieces of the batch
        return total / (items if items is not None else (labels != NO_LOSS).sum())

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A state holds a tied tensor under one of its names, and loading it fills the others: none of them is missing.
        tied = cast(PreTrainedModel, self.model).all_tied_weights_keys
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))


class _Keeping(TrainerCallback):
    """Saves the model at the steps asked for."""

    def __init__(self, steps: Collection[int], save: Save) -> None:
        self._steps = steps
        self._save = save

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            self._save(kwargs["model"], state.global_step)


class _Progress(TrainerCallback):
    """Prints a line now and then: the step, the mean loss since the last line, the pace, the time left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._losses: list[float] = []  # of the steps since the last line

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = self._told = time.monotonic()
        self._first = state.global_step  # more than 0 where training is resumed

    def on_log(self, args: Any, state: Any, control: Any, **passed: Any) -> None:
        logs = passed["logs"]
        if "loss" not in logs:  # a summary, after the last step
            return
        self._losses.append(logs["loss"])
        now, step = time.monotonic(), state.global_step
        if now - self._told < PAUSE:
            return
        loss = sum(self._losses) / len(self._losses)
        pace = (now - self._began) / (step - self._first)
        print(
            f"training {self._name}: step {step} of {state.max_steps}, loss {loss:.4f}, {pace:.2f} s a step, "
            f"{pace * (state.max_steps - step):.0f} s left",
            file=sys.stderr,
            flush=True,
        )
        self._told = now
        self._losses.clear()
