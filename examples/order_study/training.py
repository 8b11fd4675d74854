"""Train one model with transformers' Trainer, in a given order of the data and reproducibly."""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
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

from order_study.order import OrderSampler
from order_study.settings import Architecture, Run, Training
from order_study.tokens import Sample


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Make torch repeat its bits on one kind of machine: deterministic kernels, a fixed number of threads."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
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


def train(model: PreTrainedModel, samples: list[Sample], tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """Train `model` in place."""
    use_cache = model.config.use_cache
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _OrderedTrainer(
            order=run.order,
            model=model,
            args=_arguments(run.training, scratch),
            samples=samples,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[_Progress(run.name)],
        )
        trainer.remove_callback(PrinterCallback)
        with reproducible(run.threads):
            trainer.train()
    model.config.use_cache = use_cache  # the Trainer turns it off, and the saved model would generate slowly


def _arguments(training: Training, scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,  # required, though nothing is saved there
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch",
        seed=training.seed,
        use_cpu=True,
        dataloader_pin_memory=False,  # of no use on a CPU, and torch warns of it
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,  # the Trainer's bar does not say which model it trains, and prints its log as well
    )


class _OrderedTrainer(Trainer):
    """A Trainer that takes its samples in the order of a seed."""

    def __init__(self, order: int, samples: list[Sample], **arguments: Any) -> None:
        self._order = order
        self._samples = samples
        super().__init__(train_dataset=samples, **arguments)

    def get_train_dataloader(self) -> DataLoader[Sample]:
        loader: DataLoader[Sample] = DataLoader(
            self._samples,  # type: ignore[arg-type]  # any sequence will do, torch's annotation is narrower
            batch_size=self.args.per_device_train_batch_size,
            sampler=OrderSampler(len(self._samples), self._order),
            collate_fn=self.data_collator,
        )
        # accelerate's loader is the one that tells the sampler which epoch begins.
        prepared: DataLoader[Sample] = self.accelerator.prepare(loader)
        return prepared


class _Progress(TrainerCallback):
    """A progress bar that names the model; tqdm shows none where stderr is no terminal."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc=f"training {self._name}", unit="step", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()
