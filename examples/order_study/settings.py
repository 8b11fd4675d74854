"""What a study and each of its runs are: frozen, validated, and all that decides the bits of a model."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

Part = Literal["base", "fine_tuning", "held_out"]
PARTS: tuple[Part, ...] = ("base", "fine_tuning", "held_out")

Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes; transformers seeds it along with torch


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Text(_Frozen):
    """How the text is cut into passages and split; the fine-tuning part is what the other two leave."""

    source: Literal["pydoc_data.topics"] = "pydoc_data.topics"
    topics: Count | None = None  # the longest ones only; None: all
    passage_characters: Count = 400
    base: Fraction = 0.45
    held_out: Fraction = 0.15

    @model_validator(mode="after")
    def _leaves_fine_tuning(self) -> Self:
        if self.base + self.held_out >= 1:
            raise ValueError(
                f"base + held_out must stay below 1, got {self.base} + {self.held_out}: lower one of them, "
                "so that something is left to fine-tune on"
            )
        return self


class Architecture(_Frozen):
    """The size of a Llama model, under the names of transformers' LlamaConfig, and of its vocabulary."""

    vocab_size: Annotated[int, Field(ge=259)] = 1024  # at least every byte and three special tokens
    hidden_size: Count = 128
    intermediate_size: Count = 384
    num_hidden_layers: Count = 2
    num_attention_heads: Count = 4
    max_position_embeddings: Count = 512  # a token is a byte at least, so every passage of ASCII fits


class Training(_Frozen):
    """One training, save for the order of its data: what all sub-models of a study share."""

    epochs: Count
    batch_size: Count = 8
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: Seed = 0  # initial weights where a run makes its own, and dropout where the architecture has any
    # fp32 weights in training, bf16 on disk: an update below half a bf16 step is lost on saving, which leaves
    # the parameter equal to the base. A CPU takes three times as long to train in bf16 itself or in autocast.
    precision: Literal["fp32"] = "fp32"
    saved_as: Literal["bf16"] = "bf16"


class Run(_Frozen):
    """The making of one model. Sub-models of a study differ in `order`, and in the name that carries it."""

    name: str
    part: Part
    start: str | None  # name of the run whose saved model this one starts from; None: fresh weights
    architecture: Architecture
    training: Training
    threads: Count  # sums are split over threads, so their number is part of what decides the bits
    order: Seed


class Study(_Frozen):
    """A base and its sub-models, one for each order seed."""

    text: Text = Text()
    architecture: Architecture = Architecture()
    base: Training = Training(epochs=10, learning_rate=3e-3)
    fine_tuning: Training = Training(epochs=3, learning_rate=3e-4)
    base_order: Seed = 0
    orders: tuple[Seed, ...] = (1, 2, 3)
    # With models this small a second thread gains little, and where another process keeps a core busy, the
    # barriers between two cost forty times the step (measured: 78 ms with one thread, 3.5 s with two).
    threads: Count = 1

    @field_validator("orders")
    @classmethod
    def _two_different_orders(cls, orders: tuple[int, ...]) -> tuple[int, ...]:
        if len(orders) < 2 or len(set(orders)) < len(orders):
            raise ValueError(f"orders must be two or more different seeds, got {orders}: list each seed once")
        return orders

    def base_run(self) -> Run:
        """The run that trains the base from fresh weights."""
        return Run(
            name="base",
            part="base",
            start=None,
            architecture=self.architecture,
            training=self.base,
            threads=self.threads,
            order=self.base_order,
        )

    def sub_runs(self) -> list[Run]:
        """The runs that fine-tune the base, one for each order."""
        base = self.base_run()
        changes = {"part": "fine_tuning", "start": base.name, "training": self.fine_tuning}
        return [base.model_copy(update={**changes, "name": f"order-{o}", "order": o}) for o in self.orders]
