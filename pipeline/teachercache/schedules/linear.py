"""A line, never below a floor."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from teachercache.schedules.contract import StepSchedule


class LinearSchedule(StepSchedule):
    """`start · (1 - rate · t / t_max)`, or a line from `start` to `end`; never below `floor`."""

    schedule: Literal["linear"] = Field(description="a line")
    start: float = Field(description="the value at the first step")
    rate: float | None = Field(None, ge=0, le=1, description="share of start that is gone in the end")
    end: float | None = Field(None, description="in the place of rate: the value at t_max, one step after the last")
    floor: float | None = Field(None, description="never below this")

    @model_validator(mode="after")
    def _one_end(self) -> LinearSchedule:
        if (self.rate is None) == (self.end is None):
            raise ValueError("a linear schedule has a rate or an end, one of them")
        return self

    @property
    def last(self) -> float:
        """The value at t_max, were there no floor."""
        return self.start * (1 - self.rate) if self.rate is not None else float(self.end or 0.0)

    @property
    def extremes(self) -> tuple[float, ...]:
        """See `Schedule`."""
        lowest = -float("inf") if self.floor is None else self.floor
        return max(self.start, lowest), max(self.last, lowest)

    def value_at(self, t: int, t_max: int) -> float:
        """See `StepSchedule`."""
        value = self.start + (self.last - self.start) * t / t_max
        return value if self.floor is None else max(value, self.floor)
