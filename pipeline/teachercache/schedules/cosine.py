"""Half a cosine."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from teachercache.schedules.contract import StepSchedule


class CosineSchedule(StepSchedule):
    """`end + (start - end) · (1 + cos(π t / t_max)) / 2`: flat at both ends."""

    schedule: Literal["cosine"] = Field(description="half a cosine")
    start: float = Field(description="the value at the first step")
    end: float = Field(description="the value at t_max, one step after the last")

    @property
    def extremes(self) -> tuple[float, ...]:
        """See `Schedule`."""
        return self.start, self.end

    def value_at(self, t: int, t_max: int) -> float:
        """See `StepSchedule`."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t / t_max)) / 2
