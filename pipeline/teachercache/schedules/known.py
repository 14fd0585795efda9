"""`SCHEDULES`: the schedules that recipes may name, and the types of the keys that hold one.

Another schedule is a file beside this and a line here; from outside the package, `SCHEDULES.register(MySchedule)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from teachercache.registry import Registry
from teachercache.schedules.contract import ALPHA, TEMPERATURE, WEIGHT, Schedule, name_of
from teachercache.schedules.cosine import CosineSchedule
from teachercache.schedules.linear import LinearSchedule
from teachercache.schedules.ratio import RatioBalance
from teachercache.schedules.stepwise import StepwiseSchedule
from teachercache.schedules.student_loss import StudentLossSchedule
from teachercache.schedules.uncertainty import UncertaintyBalance
from teachercache.section import one_of

SCHEDULES: Registry[type[Schedule]] = Registry(
    "schedule",
    (LinearSchedule, CosineSchedule, StepwiseSchedule, StudentLossSchedule, RatioBalance, UncertaintyBalance),
    name_of=name_of,
)
NUMBER, NOTHING = "number", "nothing"


def _tag(value: Any) -> str:
    """Names the member of a union that a value of a recipe is meant to be."""
    if isinstance(value, Schedule):
        return name_of(type(value))
    if isinstance(value, dict):
        return str(value.get("schedule") or value.get("balance") or NOTHING)
    return NUMBER


def _number_or(sets: str) -> Any:
    """The type of a key that holds a number, or a schedule that may set it."""

    def added() -> dict[str, type[Schedule]]:
        return {name_of(schedule): schedule for schedule in SCHEDULES.added if sets in schedule.sets}

    schedules = {name_of(schedule): schedule for schedule in SCHEDULES.own if sets in schedule.sets}
    return one_of({NUMBER: float, **schedules}, tag_of=_tag, added=added)


if TYPE_CHECKING:
    Scheduled = float | Schedule
    Temperature = float | Schedule
    Alpha = float | Schedule
else:
    Scheduled, Temperature, Alpha = _number_or(WEIGHT), _number_or(TEMPERATURE), _number_or(ALPHA)
