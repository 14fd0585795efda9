"""Rules that follow the losses of a run. `rule_of` is the one place where they are dispatched."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from teachercache.config.schedules import RatioBalance, StudentLossSchedule, UncertaintyBalance


class Rule(Protocol):
    """A number that is settled by what came before."""

    @property
    def value(self) -> float:
        """For the next step."""

    def update(self, *, distillation: float, ce: float) -> None:
        """Hear the losses of a step."""

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, as JSON: floats come back bit by bit."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""


def rule_of(number: Any) -> Rule | None:
    """The rule that a recipe describes, at its beginning; None for numbers and schedules."""
    match number:
        case RatioBalance():
            return RatioRule(number)
        case UncertaintyBalance():
            return UncertaintyRule(number)
        case StudentLossSchedule():
            return StudentLossRule(number)
        case _:
            return None


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
