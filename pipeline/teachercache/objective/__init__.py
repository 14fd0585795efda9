"""What a student minimises: losses against the targets of a cache. Pure torch; the teacher's weights are never here.

distillation.py   the objective of a recipe: from a batch and its cached targets to sums over positions
kl.py             head-and-tail KL and cross-entropy, value and gradient in one pass
blocks.py         how that pass stays inside a processor's cache
"""

from teachercache.objective.distillation import NO_TARGET, DistillationObjective, LossTerms, required_columns

__all__ = ["NO_TARGET", "DistillationObjective", "LossTerms", "required_columns"]
