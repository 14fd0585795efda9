"""Schedules: numbers of the objective that change while a student trains. Pure Python: recipes are read without torch.

contract.py      what a schedule is: one of the step, or one that adapts to the losses by a rule
linear.py        a line
cosine.py        half a cosine
stepwise.py      one value after the other
student_loss.py  a temperature that follows the student's own loss
balance.py       what the rules for alpha share
ratio.py         alpha by the ratio of the two losses
uncertainty.py   alpha by 1 / loss
known.py         `SCHEDULES`, the list of them, and the types of a recipe's keys
numbers.py       a number or a schedule: its extremes, its value at a step, its rule

The settings of a schedule stand beside what they set. `t` counts optimizer steps from 0, `t_max` is how many there are (in a
phase, of the phase). What a whole run does with them is in `objective/objective_schedule.py`.
"""

from teachercache.schedules.contract import AdaptiveSchedule, Rule, Schedule, StepSchedule
from teachercache.schedules.known import SCHEDULES, Alpha, Scheduled, Temperature

__all__ = ["SCHEDULES", "AdaptiveSchedule", "Alpha", "Rule", "Schedule", "Scheduled", "StepSchedule", "Temperature"]
