"""End a run that cannot learn any more, instead of letting it go on for hours."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from teachercache.errors import JobFailed

# Dynamic loss scaling may halve 2^16 sixteen times, and lets one overflow pass before it does.
MOST_SKIPPED_STEPS = 20
REMEDY = "train again with a lower train.learning_rate or another train.precision, in another train.output"


class StopOnDivergence(TrainerCallback):
    """Raises `JobFailed` when a logged loss is not finite, or when step after step is skipped because gradients are not.

    Losses are summed over processes before they are logged, so all processes fail together.
    """

    def __init__(self) -> None:
        self._skipped = 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: object,
    ) -> None:
        # DeepSpeed drops a step whose gradients are not finite, in any precision, and training stands still.
        self._skipped = self._skipped + 1 if getattr(optimizer, "step_was_skipped", False) else 0
        if self._skipped > MOST_SKIPPED_STEPS:
            raise JobFailed(
                f"gradients were not finite in the {self._skipped} steps up to step {state.global_step}; {REMEDY}"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise JobFailed(f"the loss at step {state.global_step} is {loss}; {REMEDY}")
