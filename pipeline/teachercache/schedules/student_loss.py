"""Temperature that follows the student's own loss.

Wen, Lai & Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", 2019 (DTD with FLSW), with a
step's positions in the place of one sample.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from teachercache.schedules.contract import TEMPERATURE, AdaptiveSchedule


class StudentLossSchedule(AdaptiveSchedule):
    """Temperature that follows the student's own loss: `base + strength · (mean of ω - ω)` within `least` and `most`, with
    ω = (1 - p)^focus the focal weight of the step before, p = exp(-cross-entropy) the student's probability of the token
    that follows, and the mean over the last `window` steps. Where the student finds a step harder than it used to, the
    teacher is asked for sharper distributions.

    Wen, Lai & Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", 2019 (DTD with FLSW), with a
    step's positions in the place of one sample.
    """

    sets: ClassVar[tuple[str, ...]] = (TEMPERATURE,)

    schedule: Literal["student-loss"] = Field(description="follows the student's loss")
    base: float = Field(gt=0, description="the temperature where the loss is as usual")
    strength: float = Field(40.0, gt=0, description="how far the temperature follows ω")
    focus: float = Field(1.0, gt=0, description="exponent of the focal weight ω")
    window: int = Field(100, ge=1, description="steps over which the mean of ω is taken")
    least: float = Field(1.0, gt=0, description="never below this")
    most: float = Field(gt=0, description="never above this")

    @model_validator(mode="after")
    def _in_order(self) -> StudentLossSchedule:
        if not self.least <= self.base <= self.most:
            raise ValueError(f"least ({self.least:g}) <= base ({self.base:g}) <= most ({self.most:g}) must hold")
        return self

    @property
    def extremes(self) -> tuple[float, ...]:
        """See `Schedule`."""
        return self.least, self.most

    def rule(self) -> StudentLossRule:
        """See `AdaptiveSchedule`."""
        return StudentLossRule(self)


class StudentLossRule:
    """Temperature that follows the student's own loss, see `StudentLossSchedule`."""

    def __init__(self, config: StudentLossSchedule) -> None:
        self._config = config
        self._recent: deque[float] = deque(maxlen=config.window)

    @property
    def value(self) -> float:
        """base + strength · (mean ω - ω), within bounds."""
        config = self._config
        if not self._recent:
            return config.base
        mean = math.fsum(self._recent) / len(self._recent)
        return min(max(config.base + config.strength * (mean - self._recent[-1]), config.least), config.most)

    def update(self, *, distillation: float, ce: float) -> None:
        """See `Rule`."""
        self._recent.append((1 - math.exp(-max(ce, 0.0))) ** self._config.focus)

    def state_dict(self) -> dict[str, Any]:
        """See `Rule`."""
        return {"recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Rule`."""
        self._recent = deque(state["recent"], maxlen=self._config.window)
