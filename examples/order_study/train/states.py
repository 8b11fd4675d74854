"""The states that a training which was cut off resumes from: the Trainer's own checkpoints, in a scratch folder.

The folder lies beside the model's and says what is trained in it. A state counts once it is marked as complete, so
that one which was being written when the process was killed is passed over for the one before.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from examples.order_study.errors import StudyError
from examples.order_study.store.folders import Record, discard, read_record, write_record
from examples.order_study.train.checkpoints import MADE_WITH

SECONDS = 300  # between two states, unless the steps between them are set

_COMPLETE = "complete"
_PREFIX = "checkpoint-"  # as the Trainer names them


def folder_of(model: Path) -> Path:
    """The scratch folder of the training that makes a model."""
    return model.with_name(f".{model.name}.training.unfinished")


class States(TrainerCallback):
    """The states of one training; as a callback, it asks for one now and then, and marks it once it is complete."""

    def __init__(self, model: Path, made_from: dict[str, Any], every: int | None) -> None:
        """Those of the training that makes `model`; `every` is the number of steps between them."""
        self.folder = folder_of(model)
        self._every = every
        self._record = Record(made_from=made_from, made_with=MADE_WITH)  # no model is to mix bits of two versions
        self._saved = time.monotonic()

    def begin(self) -> None:
        """Prepare the scratch folder; states of another training are discarded."""
        try:
            found = read_record(self.folder)
        except StudyError:  # killed before the record was written; the name of the folder says that it is ours
            found = None
        if found != self._record:
            discard(self.folder)
            self.folder.mkdir(parents=True)
            write_record(self.folder, self._record)

    def newest(self, before: int | None = None) -> tuple[int, Path | None]:
        """The newest complete state, or the newest of fewer than `before` steps, and its steps; 0 for none."""
        complete = {_step(marker.parent): marker.parent for marker in self.folder.glob(f"{_PREFIX}*/{_COMPLETE}")}
        step = max((step for step in complete if before is None or step < before), default=0)
        return step, complete.get(step)

    def leave(self) -> None:
        """Remove what no later run can use: states that are not complete, and the folder if there is no other."""
        for state in self.folder.glob(f"{_PREFIX}*"):
            if not (state / _COMPLETE).exists():
                shutil.rmtree(state)
        if self.newest()[1] is None:
            discard(self.folder)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Decide whether the state after this step is kept; after the last one the model itself is saved."""
        due = time.monotonic() - self._saved >= SECONDS if self._every is None else state.global_step % self._every == 0
        control.should_save = due and state.global_step < state.max_steps
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the state; the Trainer calls this when all its files are written."""
        (self.folder / f"{_PREFIX}{state.global_step}" / _COMPLETE).touch()
        self._saved = time.monotonic()


def _step(state: Path) -> int:
    number = state.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else 0
