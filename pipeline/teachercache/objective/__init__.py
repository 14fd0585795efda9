"""Objectives of a student: losses against the targets of a cache. Pure torch; the teacher's weights are never here.

contract.py        what every objective takes and gives
distillation.py    the objective of a recipe: from a batch and its cached targets to sums over positions
objective_schedule.py   alpha, temperature and weights of terms at each step of a run
logits/            divergences and cross-entropy over the vocabulary, value and gradient in one pass
layers/            losses between layers of student and teacher
cross_tokenizer/   losses for a student with another tokenizer
ensemble/          several teachers as one: fusion of their distributions, and weights
token_weighting/   weights of hard positions
"""

from teachercache.objective.contract import LossTerms, Objective
from teachercache.objective.distillation import DistillationObjective
from teachercache.tasks.contract import NO_TARGET

__all__ = ["NO_TARGET", "DistillationObjective", "LossTerms", "Objective"]
