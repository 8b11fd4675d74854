"""How far each training is: a bar for each on a terminal, one line each where several run at once; lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from order_study import parallel

_PAUSE = 60.0  # seconds between two lines of a training where no bar can be shown


class Progress(TrainerCallback):
    """A progress bar that names the model; where stderr is no terminal, a line every minute."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar, with the steps done that led to the state resumed from."""
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"training {self._name}",
            unit="step",
            disable=None,
            position=parallel.position(),
        )
        self._told = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar, or print a line if the last one was a while ago."""
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._told >= _PAUSE:
            self._told = time.monotonic()
            print(f"training {self._name}: step {state.global_step} of {state.max_steps}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
