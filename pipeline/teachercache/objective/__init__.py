"""What a student minimises: losses against the targets of a cache. Pure torch; the teacher's weights are never here.

distillation.py   the objective of a recipe: from a batch and its cached targets to sums over positions
divergences.py    forward and reverse KL, Jensen-Shannon, total variation: value and gradient, outcome by outcome
emphasis.py       weights of hard positions
entropy.py        ... from entropies of student and teacher
fused.py          divergence and cross-entropy, value and gradient in one pass
projected.py      ... together with the student's output projection: no logits of a whole batch
bucketed.py       a block of that pass where the teacher's tail is one outcome
dense.py          ... where every token has its own share
tail_logits.py    a tail sketch, expanded a chunk of positions at a time
teachers/         several teachers as one: fusion of their distributions, and weights
layers/           losses between layers of student and teacher
blocks.py         how that pass stays inside a processor's cache
"""

from teachercache.objective.distillation import NO_TARGET, DistillationObjective, LossTerms

__all__ = ["NO_TARGET", "DistillationObjective", "LossTerms"]
