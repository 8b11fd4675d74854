"""A progress bar for each training, one line each where several run at once."""

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from order_study import parallel


class Progress(TrainerCallback):
    """A progress bar that names the model; tqdm shows none where stderr is no terminal."""

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

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
