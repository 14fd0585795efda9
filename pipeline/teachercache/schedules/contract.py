"""The contract of a schedule: the settings that a recipe has of it, and what it makes of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, get_args

from teachercache.section import Section

ALPHA, TEMPERATURE, WEIGHT = "alpha", "temperature", "weight"  # what a schedule may set
PROBES = 8  # points at which a schedule is tried


class Schedule(Section):
    """A value that changes with the step: a section of a recipe, with what it says. A subclass has the field `schedule`, a
    literal with its name."""

    key: ClassVar[str] = "schedule"  # the field that has its name
    sets: ClassVar[tuple[str, ...]] = (ALPHA, TEMPERATURE, WEIGHT)

    @property
    @abstractmethod
    def extremes(self) -> tuple[float, ...]:
        """Values that it takes, the least and the most among them."""

    @property
    def probes(self) -> tuple[float, ...]:
        """Values at which a run is tried before its first step: some between the extremes, or all, where these are few."""
        least, most = min(self.extremes), max(self.extremes)
        return tuple(dict.fromkeys(least + (most - least) * number / (PROBES - 1) for number in range(PROBES)))


class StepSchedule(Schedule):
    """A function of the step alone."""

    @abstractmethod
    def value_at(self, t: int, t_max: int) -> float:
        """The value after `t` of `t_max` steps, 0 <= t <= t_max."""


class AdaptiveSchedule(Schedule):
    """A value that follows the losses: alpha, or the temperature. Weights of terms do not."""

    sets: ClassVar[tuple[str, ...]] = (ALPHA, TEMPERATURE)

    @abstractmethod
    def rule(self) -> Rule:
        """The rule that settles it, at the beginning of a run."""


class Rule(Protocol):
    """A number that is settled by what came before."""

    @property
    def value(self) -> float:
        """For the next step."""

    def update(self, *, distillation: float, ce: float) -> None:
        """Take in the losses of a step, nats a position: what alpha weighs (T² · divergence), and cross-entropy."""

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, as JSON: floats come back bit by bit."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""


def name_of(schedule: type[Schedule]) -> str:
    """The name of a schedule in recipes."""
    (name,) = get_args(schedule.model_fields[schedule.key].annotation)
    return str(name)
