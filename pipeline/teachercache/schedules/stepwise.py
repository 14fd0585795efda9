"""One value after the other.

Lowering the temperature as a student learns: Jafari et al., "Annealing Knowledge Distillation", EACL 2021.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated, Literal

from pydantic import Field, model_validator

from teachercache.schedules.contract import StepSchedule


class StepwiseSchedule(StepSchedule):
    """`values[0]`, from the fraction `at[0]` of the steps on `values[1]`, and so on."""

    schedule: Literal["phases"] = Field(description="steps")
    values: tuple[float, ...] = Field(min_length=2, description="one after the other")
    at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(description="fractions of the steps, rising")

    @model_validator(mode="after")
    def _each_begins(self) -> StepwiseSchedule:
        if len(self.at) != len(self.values) - 1:
            raise ValueError(
                f"{len(self.values)} values need {len(self.values) - 1} fractions in `at`, where each but the first begins; "
                f"there are {len(self.at)}"
            )
        if list(self.at) != sorted(set(self.at)):
            raise ValueError("the fractions in `at` must rise")
        return self

    @property
    def extremes(self) -> tuple[float, ...]:
        """All values: it has no others."""
        return self.values

    @property
    def probes(self) -> tuple[float, ...]:
        """See `Schedule`."""
        return tuple(dict.fromkeys(self.values))

    def value_at(self, t: int, t_max: int) -> float:
        """See `StepSchedule`."""
        return self.values[bisect_right([at * t_max for at in self.at], t)]
