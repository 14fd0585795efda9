"""Alpha with which each loss weighs 1 / loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from teachercache.schedules.balance import Balance


class UncertaintyBalance(Balance):
    """Each term weighs 1 / loss, by the means of the last `window` steps, normalised to one. These are the weights of Kendall,
    Gal & Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018, where their uncertainties are at the
    optimum for these losses (Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning",
    2024)."""

    balance: Literal["uncertainty"] = Field(description="by 1 / loss")

    def rule(self) -> UncertaintyRule:
        """See `AdaptiveSchedule`."""
        return UncertaintyRule(self)


class UncertaintyRule:
    """Alpha with which both terms weigh 1 / loss, by means of recent losses, see `UncertaintyBalance`."""

    def __init__(self, config: UncertaintyBalance) -> None:
        self._config = config
        self._recent: deque[list[float]] = deque(maxlen=config.window)

    @property
    def value(self) -> float:
        """(1 / D) / (1 / D + 1 / CE) = CE / (D + CE)."""
        if not self._recent:
            return self._config.start
        distillation, ce = (max(math.fsum(losses), 0.0) for losses in zip(*self._recent, strict=True))
        if distillation + ce == 0:
            return self._config.start
        return min(max(ce / (distillation + ce), self._config.least), self._config.most)

    def update(self, *, distillation: float, ce: float) -> None:
        """See `Rule`."""
        self._recent.append([distillation, ce])

    def state_dict(self) -> dict[str, Any]:
        """See `Rule`."""
        return {"recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Rule`."""
        self._recent = deque(state["recent"], maxlen=self._config.window)
