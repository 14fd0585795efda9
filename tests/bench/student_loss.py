"""The loss of a student whose output layer's logits never exist whole, as the training job forms it, outside of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teachercache.objective import NO_TARGET
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.student_output import StudentOutput, output_sums
from teachercache.training.trainer.output_layer import loss_for_logits


def student_loss(
    student: Any, inputs: dict[str, Tensor], labels_BS: Tensor, *, teacher: Any, weights: Weights, vocabulary_size: int
) -> Tensor:
    """Mean loss of a position, a scalar. `teacher` holds the positions whose label is a target, in their order."""
    labels_R = labels_BS.reshape(-1)
    positions_N = (labels_R != NO_TARGET).nonzero()[:, 0]

    def loss(output: StudentOutput) -> Tensor:
        total, _, _ = output_sums(
            output,
            positions_N=positions_N,
            labels_N=labels_R[positions_N],
            teacher=teacher,
            weights=weights,
            vocabulary_size=vocabulary_size,
        )
        return total / len(positions_N)

    with loss_for_logits(student, loss):
        return student(**inputs, use_cache=False).logits.reshape(())
