"""Several teachers of one student, from several caches of the same text: recipe section `teachers`.

weights.py        how much each counts at a position: fixed, by confidence, by validation
teacher_view.py   what one teacher says in a block of positions, perhaps in another vocabulary
fused_tail.py     their distributions as one, a block at a time
fused_teacher.py  all of it, from the arrays of a batch
"""

from __future__ import annotations

from teachercache.objective.ensemble.fused_teacher import EnsembleMember, FusedTeacher
from teachercache.objective.ensemble.weights import TeacherWeights

__all__ = ["EnsembleMember", "FusedTeacher", "TeacherWeights"]
