"""Numbers of an objective as recipes have them, be it a constant or a schedule: extremes, bounds, values, rules."""

from __future__ import annotations

from teachercache.schedules.contract import AdaptiveSchedule, Rule, Schedule, StepSchedule

MOST_TEMPERATURE = 100.0  # beyond it the difference of two softened distributions is rounding, times T²


def extremes_of(number: float | Schedule) -> tuple[float, ...]:
    """A number, or the extremes of what a schedule makes of it."""
    return number.extremes if isinstance(number, Schedule) else (number,)


def probes_of(number: float | Schedule) -> tuple[float, ...]:
    """Values that a number takes: all of them, or where it changes smoothly some, with its extremes."""
    return number.probes if isinstance(number, Schedule) else (number,)


def rule_of(number: float | Schedule) -> Rule | None:
    """The rule that a recipe describes, at its beginning; None for numbers and for functions of the step."""
    return number.rule() if isinstance(number, AdaptiveSchedule) else None


def value_at(number: float | Schedule, first: int, steps: int, *, step: int) -> float:
    """A number, or what a function of the step that runs over `steps` steps from `first` on makes of it at `step`; before its
    first step as there, and after its last one as at its end."""
    if isinstance(number, Schedule):
        assert isinstance(number, StepSchedule)  # rules have a value of their own
        return number.value_at(min(max(step - first, 0), steps), steps)
    return float(number)


def within(
    number: float | Schedule, *, name: str, least: float, most: float = float("inf"), open_below: bool = False
) -> float | Schedule:
    """The number, or the schedule; raises `ValueError` where a value of it lies outside."""
    for value in extremes_of(number):
        if not (least < value if open_below else least <= value) or value > most:
            bound = f"above {least:g}" if open_below else f"{least:g} or more"
            bound = bound if most == float("inf") else f"{bound} and at most {most:g}"
            raise ValueError(f"{name} must be {bound}, and becomes {value:g}")
    return number
