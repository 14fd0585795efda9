"""How far the student is from each of several teachers on held-out rows, where their weights follow that.

Shapes: N positions, K teachers, D width of the output layer's input, L columns of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teachercache.objective.distillation import labelled_positions
from teachercache.objective.ensemble import FusedTeacher
from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.projected import projected_sums
from teachercache.targets import TargetKind
from teachercache.training.trainer.held_out import HeldOutMeasure, Layer, Measure

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

    def add_hidden(self, hidden_ND: Tensor, layer: Layer, labels_N: Tensor, targets: dict[str, Tensor]) -> None:
        """See `Measure`."""
        self._own.add_hidden(hidden_ND, layer, labels_N, _of_first(targets))
        weight_LD, bias_L, softcap = layer
        each, all_N = self._teacher.each(targets, 1.0, like=labels_N, dtype=torch.float32)
        sums = [
            projected_sums(
                hidden_ND, weight_LD, bias_L, labels_N=labels_N, teacher=teacher, weights=MEASURED, softcap=softcap,
                vocabulary_size=self._teacher.vocabulary_size,
            )
            for teacher in each
        ]  # fmt: skip
        self._add(sums, all_N)

    def add_logits(self, logits_BSL: Tensor, labels_BS: Tensor, targets: dict[str, Tensor]) -> None:
        """See `Measure`."""
        self._own.add_logits(logits_BSL, labels_BS, _of_first(targets))
        positions_N, labels_N = labelled_positions(labels_BS)
        each, all_N = self._teacher.each(targets, 1.0, like=labels_N, dtype=torch.float32)
        sums = [
            distillation_sums(
                logits_BSL, positions_N=positions_N, labels_N=labels_N, teacher=teacher, weights=MEASURED,
                vocabulary_size=self._teacher.vocabulary_size,
            )
            for teacher in each
        ]  # fmt: skip
        self._add(sums, all_N)

    def _add(self, sums: Sequence[tuple[Tensor, Tensor, Tensor]], all_N: Tensor) -> None:
        further = torch.stack([*(kl.double() for _, kl, _ in sums), all_N.sum().double()]).to(self.sums.device)
        own = len(self._own.sums)
        self.sums = torch.cat([self._own.sums, self.sums[own:] + further])

    @staticmethod
    def metrics(sums: Tensor, *, prefix: str) -> dict[str, float]:
        """`kl_teacher_0`, … beside what `HeldOutMeasure` gives."""
        own, further = sums[:OWN], sums[OWN:].tolist()
        kls = {f"{prefix}_kl_teacher_{number}": kl / max(further[-1], 1) for number, kl in enumerate(further[:-1])}
        return HeldOutMeasure.metrics(own, prefix=prefix) | kls


def _of_first(targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in targets.items() if "/" not in name}
