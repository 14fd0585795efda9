"""The common part of the rules that balance alpha by the two losses."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from teachercache.schedules.contract import ALPHA, AdaptiveSchedule


class Balance(AdaptiveSchedule):
    """Common part of the rules for alpha: each begins at `start`, stays within `least` and `most`, and follows the
    losses of the last `window` steps. A subclass has the field `balance`, a literal with its name."""

    key: ClassVar[str] = "balance"
    sets: ClassVar[tuple[str, ...]] = (ALPHA,)

    start: float = Field(0.5, ge=0, le=1, description="alpha at the first step")
    window: int = Field(100, ge=1, description="steps whose losses are looked at")
    least: float = Field(0.05, gt=0, lt=1, description="alpha is never below this")
    most: float = Field(0.95, gt=0, le=1, description="alpha is never above this")

    @model_validator(mode="after")
    def _in_order(self) -> Balance:
        if not self.least <= self.start <= self.most:
            raise ValueError(f"least ({self.least:g}) <= start ({self.start:g}) <= most ({self.most:g}) must hold")
        return self

    @property
    def extremes(self) -> tuple[float, ...]:
        """See `Schedule`."""
        return self.least, self.most
