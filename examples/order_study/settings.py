"""What a study and each of its runs are: frozen and validated; a YAML configuration maps onto `Study` as it is.

Longer than other modules, since it is the one list of all settings with their defaults.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator
from typing_extensions import Self

from examples.order_study.sources import Count, Data, Fraction, Frozen, Name, Text, TextFile, unset

Part = Literal["base", "fine_tuning", "validation", "held_out"]
Composition = Literal["redrawn", "fixed"]
Precision = Literal["fp32", "bf16_mixed", "bf16"]
Stored = Literal["bf16", "fp32"]
Device = Literal["auto", "cpu", "cuda"]

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes; transformers seeds it along with torch

BASE = "base"  # name of the model that all others start from
# Controls, which merges of sub-models of different orders are held against. Trained, all in the first order:
LONGER = "longer"  # one model, for the epochs of all sub-models together
MORE_STEPS = "more-steps"  # one model, for as many epochs as a sub-model, in as many steps as all of them together
SAME_ORDER = "same-order"  # as many models as there are sub-models, which differ in noise and dropout
TRAINED_CONTROLS = (LONGER, MORE_STEPS, SAME_ORDER)
# Merged:
SAME_ORDER_AVERAGE = "same-order-average"  # of the models of SAME_ORDER, and made along with them
SOUP = "soup"  # the greedy soup of the sub-models
STRETCHED = "stretched"  # the average, as far from the base as selection is
SHRUNK = "shrunk"  # selection, as close to the base as the average is
DERIVED_CONTROLS = (SOUP, STRETCHED, SHRUNK)  # merges that need others, or measurements, first
# Neither:
ENSEMBLE = "ensemble"  # the mean of the probabilities of the sub-models, K times the work when used

NOISE = 1e-3  # of SAME_ORDER: standard deviation of what is added to each tensor at the start, in those of the tensor
DROPOUT = 0.1  # of SAME_ORDER: in attention, where Llama and its kin have their only dropout

_CONTROLS = ("ties", "dare_ties", *TRAINED_CONTROLS, *DERIVED_CONTROLS, ENSEMBLE)


def _control(value: str) -> str:
    if value not in _CONTROLS and not re.fullmatch(r"stretch-\d+(\.\d+)?", value):
        raise ValueError(
            f"a control must be {', '.join(_CONTROLS)}, or stretch- and a factor, got {value!r}: write for example "
            "stretch-1.1"
        )
    return value


Control = Annotated[str, AfterValidator(_control)]


class Architecture(Frozen):
    """The size of a Llama model, under the names of transformers' LlamaConfig, and of its vocabulary."""

    vocab_size: Annotated[int, Field(ge=259)] = 1024  # at least every byte and three special tokens
    hidden_size: Count = 128
    intermediate_size: Count = 384
    num_hidden_layers: Count = 2
    num_attention_heads: Count = 4
    max_position_embeddings: Count = 512  # a token is a byte at least, so every passage of ASCII fits


class Lora(Frozen):
    """Adapters of low rank instead of full fine-tuning; they are in fp32 whatever the weights they add to are in."""

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | None = None  # None: every linear layer but the output


class Training(Frozen):
    """One training, save for the order of its data: what all sub-models of a study share."""

    epochs: Count
    batch_size: Count = 8  # samples per step, in `gradient_accumulation` pieces
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: Seed = 0  # initial weights where a run makes its own, and dropout where the architecture has any
    # fp32: weights and arithmetic in fp32. bf16_mixed: fp32 weights, arithmetic in bf16 where that is safe. bf16:
    # both in bf16. An update below half a bf16 step is lost on saving as bf16, and with bf16 weights at every step,
    # which leaves the parameter equal to the base. A step in bf16 took three quarters of the time of one in fp32 on a
    # CPU that knows bf16, and three times as long on another.
    precision: Precision = "fp32"
    saved_as: Stored = "bf16"
    lora: Lora | None = None
    save_steps: Count | None = None  # steps between the states that training can resume from; None: five minutes
    max_steps: Count | None = Field(default=None, exclude_if=unset)  # ends the training before its last epoch does
    # At the start, a normal number is added to each weight: this many times the standard deviation of its tensor.
    noise: Annotated[float, Field(ge=0)] = Field(default=0.0, exclude_if=unset)
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, exclude_if=unset)

    @model_validator(mode="after")
    def _pieces_are_whole(self) -> Self:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size must be a multiple of gradient_accumulation, got {self.batch_size} and "
                f"{self.gradient_accumulation}: change one of them"
            )
        return self

    def batches(self, samples: int) -> int:
        """Batches in an epoch over so many samples."""
        return -(-samples // self.batch_size)

    def steps(self, samples: int) -> int:
        """Optimiser steps in all."""
        whole = self.epochs * self.batches(samples)
        return whole if self.max_steps is None else min(whole, self.max_steps)


class FreshBase(Frozen):
    """A base that the study trains itself, from random weights."""

    architecture: Architecture = Architecture()
    training: Training = Training(epochs=10, learning_rate=3e-3)
    order: Seed = 0
    text: tuple[TextFile, ...] | None = None  # None: the base part of pydoc_data.topics
    threads: Count | None = None  # None: those of the study

    @field_validator("training")
    @classmethod
    def _all_weights(cls, training: Training) -> Training:
        if training.lora is not None:
            raise ValueError("a fresh base has no weights yet that an adapter could add to: leave lora out")
        return training


class GivenBase(Frozen):
    """A base that exists: any causal language model that transformers loads."""

    model: Name  # a folder, or an id on the hub
    revision: str | None = None


def _which_base(value: Any) -> str:
    return "given" if isinstance(value, GivenBase) or (isinstance(value, Mapping) and "model" in value) else "fresh"


Base = Annotated[
    Annotated[FreshBase, Tag("fresh")] | Annotated[GivenBase, Tag("given")],
    Discriminator(_which_base),
]


class Merging(Frozen):
    """Which merges are made beside the average."""

    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0, 1, 2)
    rounds: tuple[Count | None, ...] = (1, 2, 3, None)  # None: until the value drawn differs from the base's

    @model_validator(mode="after")
    def _different(self) -> Self:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different seeds, got {self.seeds}: list each seed once")
        if len(set(self.rounds)) < len(self.rounds):
            raise ValueError(f"rounds must be different, got {self.rounds}: list each number once")
        return self


class ExactMatch(Frozen):
    """Greedy decoding, and whether the answer is right: in its final number, or as a whole.

    Whether it is the response as a whole is seen in passing where losses are measured, with nothing generated.
    """

    of: Literal["number", "response"] = Field(default="number", exclude_if=lambda value: value == "number")
    samples: Count | None = None  # of the held-out part; None: all
    max_new_tokens: Count = 256  # of a generated answer


class Measuring(Frozen):
    """What is measured of the models."""

    bins: Count = 20  # of position in the epoch
    bootstrap: Count = 2000  # resamples
    confidence: Fraction = 0.95
    seed: Seed = 0  # of the bootstrap
    batch_size: Count = 16
    training_samples: Count | None = None  # loss on the first n fine-tuning samples only; None: on all
    exact_match: ExactMatch | None = None
    precision: Stored | None = Field(default=None, exclude_if=unset)  # arithmetic of the models; None: fp32


class Run(Frozen):
    """The training of one model. Sub-models of a study differ in `order`, and in the name that carries it."""

    name: str
    part: Part
    start: str | None  # name of the model whose saved weights this one starts from; None: fresh weights
    architecture: Architecture | None  # of fresh weights
    training: Training
    composition: Composition
    device: Device
    threads: Count  # sums are split over threads, so their number is part of what decides the bits
    order: Seed
    shared_prefix: bool = Field(default=False, exclude_if=unset)


class Throw(Frozen):
    """One more set of sub-models: orders that no other throw has, and a training seed."""

    orders: tuple[Seed, ...]
    seed: Seed


class Study(Frozen):
    """A base and its sub-models, one for each order seed, and what is done with them."""

    data: Data = Text()
    base: Base = FreshBase()
    fine_tuning: Training = Training(epochs=3, learning_rate=3e-4)
    orders: tuple[Seed, ...] = (1, 2, 3)
    # The whole study once for each, in a folder of its own, and a table over all; in place of `orders`.
    throws: tuple[Throw, ...] = Field(default=(), exclude_if=unset)
    # redrawn: each epoch is a fresh permutation of the samples, cut into batches. fixed: the samples are cut into
    # batches once, the same for all orders, and each epoch is a fresh permutation of the batches.
    composition: Composition = "redrawn"
    checkpoints: Annotated[int, Field(ge=0)] = 0  # states kept of each sub-model before its last, evenly spaced
    # Tokens that all samples begin with, as those of a chat template, go through the model once a batch, and logits are
    # made of responses alone: the same loss up to rounding. For full attention, and not with gradient_checkpointing.
    shared_prefix: bool = Field(default=False, exclude_if=unset)
    threads: Count = 1
    device: Device = "cpu"  # auto: an accelerator where there is one
    merging: Merging = Merging()
    # What the merges are held against: stretch-1.1 is the average at 1.1 times its distance from the base; the others
    # stand at the top of this module.
    controls: tuple[Control, ...] = Field(default=(), exclude_if=unset)
    # Models from elsewhere that are measured beside these: a name for the tables, and the folder of a checkpoint. The
    # first is what the rest of them is held against.
    others: dict[str, Name] = Field(default={}, exclude_if=unset)
    measuring: Measuring = Measuring()

    @field_validator("others")
    @classmethod
    def _names_of_others(cls, others: dict[str, str]) -> dict[str, str]:
        for name in others:
            if not re.fullmatch(r"other-[\w.-]+", name):
                raise ValueError(f"the name of a model from elsewhere begins with other-, got {name!r}: rename it")
        return others

    @field_validator("orders")
    @classmethod
    def _different_orders(cls, orders: tuple[int, ...]) -> tuple[int, ...]:
        if not orders or len(set(orders)) < len(orders):
            raise ValueError(f"orders must be one or more different seeds, got {orders}: list each seed once")
        return orders

    @model_validator(mode="after")
    def _throws_are_disjoint(self) -> Self:
        if not self.throws:
            return self
        if "orders" in self.model_fields_set:
            raise ValueError("orders are those of each throw where there are throws: leave orders out")
        every = [order for throw in self.throws for order in throw.orders]
        if len(self.throws) < 2 or len(set(every)) < len(every) or len({len(t.orders) for t in self.throws}) > 1:
            raise ValueError(
                "throws must be two or more with as many orders each, and no order may be in two of them, got orders "
                f"{[list(throw.orders) for throw in self.throws]}: change them"
            )
        return self

    def each_throw(self) -> list["Study"]:
        """The study of each throw; without throws, this one."""
        return [
            Study.model_validate(
                {
                    **{name: getattr(self, name) for name in self.model_fields_set if name != "throws"},
                    "orders": throw.orders,
                    "fine_tuning": self.fine_tuning.model_copy(update={"seed": throw.seed}),
                }
            )
            for throw in self.throws
        ] or [self]

    @model_validator(mode="after")
    def _keeps_what_is_shared(self) -> Self:
        if self.shared_prefix and self.fine_tuning.gradient_checkpointing:
            raise ValueError(
                "shared_prefix keeps keys and values, which gradient_checkpointing throws away: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _base_fits(self) -> Self:
        if SOUP in self.controls and not self.has_validation():
            raise ValueError(
                f"a greedy soup is chosen on data for validation, but data has none: name it, or leave {SOUP} out"
            )
        if len(set(self.controls)) < len(self.controls) or (self.controls and len(self.orders) == 1):
            raise ValueError(
                f"controls must be different, and need two or more orders, got {list(self.controls)} for orders "
                f"{list(self.orders)}: list each control once, or add orders"
            )
        if isinstance(self.base, GivenBase):
            return self
        if self.base.text is None and not isinstance(self.data, Text):
            raise ValueError(
                "a base is trained from fresh weights on text of its own, but base.text is missing: name files "
                "there, or a base that exists as base.model"
            )
        if self.base.training.saved_as != self.fine_tuning.saved_as:
            raise ValueError(
                "base and sub-models must be saved in one dtype to be compared and merged, got "
                f"{self.base.training.saved_as} for the base and {self.fine_tuning.saved_as} for fine_tuning: "
                "make saved_as the same"
            )
        return self

    def has_validation(self) -> bool:
        """Whether there are samples to choose a model by, apart from those that it is measured on."""
        return any(getattr(self.data, name, None) is not None for name in ("validation", "validation_split"))

    def base_run(self) -> Run | None:
        """The run that trains the base from fresh weights; None for a base that is given."""
        if isinstance(self.base, GivenBase):
            return None
        return Run(
            name=BASE,
            part="base",
            start=None,
            architecture=self.base.architecture,
            training=self.base.training,
            composition="redrawn",
            device=self.device,
            threads=self.base.threads or self.threads,
            order=self.base.order,
        )

    def sub_runs(self) -> list[Run]:
        """The runs that fine-tune the base: one for each order, and the controls that are trained."""
        runs = [
            Run(
                name=f"order-{order}",
                part="fine_tuning",
                start=BASE,
                architecture=None,
                training=self.fine_tuning,
                composition=self.composition,
                device=self.device,
                threads=self.threads,
                order=order,
                shared_prefix=self.shared_prefix,
            )
            for order in self.orders
        ]
        first, tuning, times = runs[0], self.fine_tuning, len(self.orders)
        steps = None if tuning.max_steps is None else times * tuning.max_steps

        def control(name: str, **changes: Any) -> Run:
            return first.model_copy(update={"name": name, "training": tuning.model_copy(update=changes)})

        if LONGER in self.controls:
            runs.append(control(LONGER, epochs=times * tuning.epochs, max_steps=steps))
        if MORE_STEPS in self.controls:
            size = max(1, tuning.batch_size // times)
            runs.append(control(MORE_STEPS, batch_size=size, gradient_accumulation=1, max_steps=steps))
        if SAME_ORDER in self.controls:
            runs += [
                control(f"{SAME_ORDER}-{seed}", seed=seed, noise=NOISE, attention_dropout=DROPOUT)
                for seed in self.same_order_seeds()
            ]
        return runs

    def same_order_seeds(self) -> range:
        """The training seeds of the models of `SAME_ORDER`: none that another throw has, if throws differ in theirs."""
        times = len(self.orders)
        return range(1 + self.fine_tuning.seed * times, 1 + (self.fine_tuning.seed + 1) * times)
