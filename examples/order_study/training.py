"""Train one model with transformers' Trainer, in a given order of the data and reproducibly."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
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
    set_seed,
)

from order_study.order import OrderedBatches
from order_study.progress import Progress
from order_study.settings import Architecture, Device, Precision, Run
from order_study.states import KEPT, Saving, States, step_of
from order_study.tokens import Sample, collator


@dataclass(frozen=True)
class Snapshots:
    """Which steps of a training are saved as models of their own, and how."""

    steps: Collection[int]
    save: Callable[[PreTrainedModel, int], None]


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
    snapshots: Snapshots,
) -> int:
    """Train `model` in place, from the newest state there is; return after how many steps that was."""
    use_cache = model.config.use_cache
    states.begin()
    if run.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]  # as transformers ships it
    trainer = _OrderedTrainer(
        run=run,
        model=model,
        args=_arguments(run, str(states.folder)),
        samples=samples,
        data_collator=collator(tokenizer),
        callbacks=[Progress(run.name), _Snapshots(snapshots), Saving(states.every)],
    )
    trainer.remove_callback(PrinterCallback)
    # No snapshot is made of a step that a resumed training does not come by.
    state = states.newest(before=min(snapshots.steps, default=None))
    try:
        with reproducible(run.threads):
            trainer.train(resume_from_checkpoint=None if state is None else str(state))
    finally:
        states.leave()
    model.config.use_cache = use_cache  # the Trainer turns it off, and the saved model would generate slowly
    return step_of(state)


def _arguments(run: Run, scratch: str) -> TrainingArguments:
    training = run.training
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=training.epochs,
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
        save_strategy="no",  # `Saving` decides
        save_total_limit=KEPT,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,  # the Trainer's bar does not say which model it trains, and prints its log as well
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


class _Snapshots(TrainerCallback):
    """Saves the model at the steps asked for."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._snapshots.steps:
            self._snapshots.save(kwargs["model"], state.global_step)
