"""The states that a training which was cut off resumes from: the Trainer's own checkpoints, in a scratch folder.

The folder lies beside the model's and says what is trained in it. A state counts once it is marked as complete, so
that one which was being written when the process was killed is passed over for the one before.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from order_study.checkpoints import Origin, made_with
from order_study.errors import StudyError
from order_study.folders import FolderRecord, discard, read_record, write_record

KEPT = 2  # the newest may be torn, and then the one before is needed
SECONDS = 300  # between two states, unless the steps between them are set

_RECORD = "resumable.json"
_COMPLETE = "complete"
_PREFIX = "checkpoint-"  # as the Trainer names them


class _StatesRecord(FolderRecord):
    origin: Origin
    made_with: dict[str, str]  # bits of two versions must not be mixed in one model


def folder_of(model: Path) -> Path:
    """The scratch folder of the training that makes a model."""
    return model.with_name(f".{model.name}.training.unfinished")


class States:
    """The states of one training."""

    def __init__(self, model: Path, origin: Origin, every: int | None) -> None:
        """Those of the training that makes `model`; `every` is the number of steps between them."""
        self.folder = folder_of(model)
        self.every = every
        self._record = _StatesRecord(origin=origin, made_with=made_with())

    def begin(self) -> None:
        """Prepare the scratch folder; states of another origin are discarded."""
        if _read(self.folder) != self._record:
            discard(self.folder)
            self.folder.mkdir(parents=True)
            write_record(self.folder, _RECORD, self._record)

    def newest(self, before: int | None = None) -> Path | None:
        """The newest complete state, or the newest of fewer than `before` steps."""
        complete = {_step(marker.parent): marker.parent for marker in self.folder.glob(f"{_PREFIX}*/{_COMPLETE}")}
        steps = [step for step in complete if before is None or step < before]
        return complete[max(steps)] if steps else None

    def leave(self) -> None:
        """Remove what no later run can use: states that are not complete, and the folder if there is no other."""
        for state in self.folder.glob(f"{_PREFIX}*"):
            if not (state / _COMPLETE).exists():
                shutil.rmtree(state)
        if self.newest() is None:
            discard(self.folder)


class Saving(TrainerCallback):
    """Asks the Trainer for a state now and then, and marks it once it is complete."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._saved = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Decide whether the state after this step is kept; after the last one the model itself is saved."""
        due = time.monotonic() - self._saved >= SECONDS if self._every is None else state.global_step % self._every == 0
        control.should_save = due and state.global_step < state.max_steps
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the state; the Trainer calls this when all its files are written."""
        (Path(str(args.output_dir)) / f"{_PREFIX}{state.global_step}" / _COMPLETE).touch()
        self._saved = time.monotonic()


def step_of(state: Path | None) -> int:
    """The number of steps that led to a state; 0 without one."""
    return 0 if state is None else _step(state)


def _step(state: Path) -> int:
    number = state.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else 0


def _read(folder: Path) -> _StatesRecord | None:
    try:
        return read_record(folder, _RECORD, _StatesRecord)
    except StudyError:  # killed before the record was written; the name of the folder says that it is ours
        return None
