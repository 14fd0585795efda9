"""Schedules: what the objective is at each step of a run.

objective_schedule.py  alpha, temperature and the weights of terms, of a whole run
schedules.py           pure functions of the step
rules.py               what follows the losses: balances of alpha, and a temperature that follows the student's loss
"""
