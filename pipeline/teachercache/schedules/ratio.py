"""Alpha by the ratio of the distillation loss to the task loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from teachercache.schedules.balance import Balance


class RatioBalance(Balance):
    """Once more than `window` distillation losses are recorded: where the mean of the last `window` exceeds `high` times the
    task loss, alpha = max(least, down · alpha); where it is below `low` times the task loss, alpha = min(most, up · alpha).
    The defaults are those of the article that calls it a gradient balancer."""

    balance: Literal["ratio"] = Field(description="by the ratio of the losses")
    start: float = Field(0.7, ge=0, le=1, description="alpha at the first step")
    high: float = Field(1.5, gt=0, description="alpha shrinks where the ratio is above this")
    low: float = Field(0.7, gt=0, description="alpha grows where the ratio is below this")
    down: float = Field(0.95, gt=0, le=1, description="factor by which alpha shrinks")
    up: float = Field(1.05, ge=1, description="factor by which alpha grows")
    least: float = Field(0.5, gt=0, lt=1, description="alpha is never below this")
    most: float = Field(0.9, gt=0, le=1, description="alpha is never above this")

    @model_validator(mode="after")
    def _low_below_high(self) -> RatioBalance:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self

    def rule(self) -> RatioRule:
        """See `AdaptiveSchedule`."""
        return RatioRule(self)


class RatioRule:
    """Alpha by the mean of recent distillation losses against the task loss of the step, see `RatioBalance`."""

    def __init__(self, config: RatioBalance) -> None:
        self._config = config
        self.value = config.start
        self._recent: deque[float] = deque(maxlen=config.window)
        self._recorded = 0

    def update(self, *, distillation: float, ce: float) -> None:
        """See `Rule`."""
        config = self._config
        self._recent.append(distillation)
        self._recorded += 1
        if self._recorded <= config.window:
            return
        mean = math.fsum(self._recent) / len(self._recent)
        if mean > config.high * ce:
            self.value = max(config.least, config.down * self.value)
        elif mean < config.low * ce:
            self.value = min(config.most, config.up * self.value)

    def state_dict(self) -> dict[str, Any]:
        """See `Rule`."""
        return {"value": self.value, "recent": list(self._recent), "recorded": self._recorded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Rule`."""
        self.value, self._recorded = state["value"], state["recorded"]
        self._recent = deque(state["recent"], maxlen=self._config.window)
