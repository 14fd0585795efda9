"""The learning rate of a run in phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def with_factors(scheduler: Any, factor: Callable[[int], float]) -> Any:
    """The scheduler, with what it gives at each step multiplied by the factor of that step. Those of transformers that are no
    `LambdaLR` stay as they are where every factor is 1, which is all that they are asked for.

    Steps are those that the scheduler counts: under fp16, of which a step that overflows counts as none, a factor comes as many
    steps late."""
    if not isinstance(scheduler, LambdaLR):
        return scheduler
    scheduler.lr_lambdas = [_times(schedule, factor) for schedule in scheduler.lr_lambdas]
    for group, rate, schedule in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * schedule(scheduler.last_epoch)
    return scheduler


def _times(rate: Callable[[int], float], factor: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: rate(step) * factor(step)
