"""Times at which a run logs, evaluates and saves beyond the intervals of `TrainingArguments`; and its beginning at step
0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from teachercache.stream.order.batch_plan import Plan


class LogAndSaveCallback(TrainerCallback):
    """Logging windows end where a checkpoint may be taken, and a new best evaluation is always saved."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: object,
    ) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state brings the intervals of the run before
        if state.global_step == 0:
            _uncount_steps(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        state.epoch = self._plan.epochs_before(state.global_step)  # to Trainer the whole run is one epoch
        if self._plan.ends_phase(state.global_step):
            control.should_log = True  # no window holds losses of two phases
            control.should_evaluate = control.should_evaluate or args.eval_strategy != "no"  # so that phases compare
        if control.should_save or control.should_evaluate or control.should_training_stop:
            control.should_log = True  # a window across a checkpoint would be logged otherwise by a resumed run

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        best = float("inf") if state.best_metric is None else state.best_metric
        if metrics and metrics.get("eval_loss", best) < best:
            control.should_save = True  # the best student is exported from its checkpoint


def _uncount_steps(optimizer: Any) -> None:
    """Without ZeRO, DeepSpeed's 16-bit optimizer allocates its state by a step with zero gradients. Adam counts it, and
    its bias correction then shrinks the first real step to three quarters."""
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's, then torch's own
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].zero_()
