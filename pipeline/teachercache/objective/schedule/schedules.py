"""Schedules as pure functions of the step.

Lowering the temperature as a student learns: Jafari et al., "Annealing Knowledge Distillation", EACL 2021.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

from teachercache.config.schedules import CosineSchedule, LinearSchedule, StepwiseSchedule, values_of

PROBES = 8  # points at which a schedule is tried


def value_at(number: Any, first: int, steps: int, *, step: int) -> float:
    """A number, or what a schedule that runs over `steps` steps from `first` on makes of it at `step`; before its first step as
    there, and after its last one as at its end."""
    t, t_max = min(max(step - first, 0), steps), steps
    match number:
        case LinearSchedule():
            value = number.start + (number.last - number.start) * t / t_max
            return value if number.floor is None else max(value, number.floor)
        case CosineSchedule():
            return number.end + (number.start - number.end) * (1 + math.cos(math.pi * t / t_max)) / 2
        case StepwiseSchedule():
            return number.values[bisect_right([at * t_max for at in number.at], t)]
        case _:
            return float(number)


def probes(number: Any) -> tuple[float, ...]:
    """Values that a number takes: all of them, or where it changes smoothly some, with its extremes."""
    if isinstance(number, StepwiseSchedule) or not hasattr(number, "values"):
        return tuple(dict.fromkeys(values_of(number)))
    least, most = min(values_of(number)), max(values_of(number))
    return tuple(dict.fromkeys(least + (most - least) * place / (PROBES - 1) for place in range(PROBES)))
