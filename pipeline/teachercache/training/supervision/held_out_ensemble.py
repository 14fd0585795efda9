"""Distances of the student from each of several teachers on held-out rows, where their weights follow that.

Shapes: B rows, S tokens, N positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teachercache.objective.ensemble import FusedTeacher
from teachercache.objective.logits.operands import Weights, labelled_positions
from teachercache.objective.logits.student_output import StudentOutput, output_sums
from teachercache.targets import TargetKind
from teachercache.training.supervision.held_out import HeldOutMeasure, Measure

MEASURED = Weights(0.5, 1.0)  # neither weight may be zero
OWN = 5  # sums of `HeldOutMeasure`


class TaughtMeasure(Measure):
    """Metrics of `HeldOutMeasure`, which are against the run's own cache, and `kl_teacher_0`, … to each teacher, at the
    positions where all of them speak: elsewhere their distances would not compare."""

    def __init__(self, kind: TargetKind, *, tail: str, device: torch.device, teacher: FusedTeacher) -> None:
        self._own, self._teacher = HeldOutMeasure(kind, tail=tail, device=device), teacher
        self.columns = tuple(dict.fromkeys([*self._own.columns, *teacher.columns]))
        further = torch.zeros(len(teacher.members) + 1, dtype=torch.float64, device=device)
        self.sums = torch.cat([self._own.sums, further])

    def add(self, output: StudentOutput, labels_BS: Tensor, targets: dict[str, Tensor]) -> None:
        """See `Measure`."""
        self._own.add(output, labels_BS, _of_first(targets))
        positions_N, labels_N = labelled_positions(labels_BS)
        every, all_N = self._teacher.each(targets, 1.0, like=labels_N, dtype=torch.float32)
        sums = [
            output_sums(
                output, positions_N=positions_N, labels_N=labels_N, teacher=teacher, weights=MEASURED,
                vocabulary_size=self._teacher.vocabulary_size,
            )
            for teacher in every
        ]  # fmt: skip
        further = torch.stack([*(kl.double() for _, kl, _ in sums), all_N.sum().double()]).to(self.sums.device)
        own_size = len(self._own.sums)
        self.sums = torch.cat([self._own.sums, self.sums[own_size:] + further])

    @staticmethod
    def metrics(sums: Tensor, *, prefix: str) -> dict[str, float]:
        """`kl_teacher_0`, … beside what `HeldOutMeasure` gives."""
        own_sums, further = sums[:OWN], sums[OWN:].tolist()
        kls = {f"{prefix}_kl_teacher_{number}": kl / max(further[-1], 1) for number, kl in enumerate(further[:-1])}
        return HeldOutMeasure.metrics(own_sums, prefix=prefix) | kls


def _of_first(targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in targets.items() if "/" not in name}
