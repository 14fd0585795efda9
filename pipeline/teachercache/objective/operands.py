"""What enters the loss: the teacher's head, the weights, and the student's logits at single tokens.

Shapes: R rows of the flat logits, L columns; N positions, k tokens of the head. Log-probabilities in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherHead:
    """The teacher at temperature T: the tokens of the head, and one bucket for all others. -inf stands for p = 0.

    The ids of a position are distinct; Σ exp(log_prob) + exp(tail_log_prob) = 1.
    """

    ids_Nk: Tensor  # int64
    log_prob_Nk: Tensor
    tail_log_prob_N: Tensor

    def renormalised(self) -> TeacherHead:
        """The head alone, scaled to mass 1; the bucket is empty."""
        mass_N1 = self.log_prob_Nk.logsumexp(-1, keepdim=True)
        return TeacherHead(self.ids_Nk, self.log_prob_Nk - mass_N1, torch.full_like(self.tail_log_prob_N, -math.inf))

    @classmethod
    def absent(cls, labels_N: Tensor, dtype: torch.dtype) -> TeacherHead:
        """No teacher: k = 0 and everything in the bucket, so that KL is 0 whatever the student does."""
        none_N0 = labels_N.new_empty(len(labels_N), 0)
        return cls(none_N0, none_N0.to(dtype), torch.zeros(len(labels_N), dtype=dtype, device=labels_N.device))


@dataclass(frozen=True)
class Weights:
    """α and T of the loss; without a teacher α = 0 and T = 1."""

    alpha: float
    temperature: float


@dataclass(frozen=True)
class Batch:
    """All operands of the loss but for the dense logits."""

    positions_N: Tensor  # indices into R, rising
    labels_N: Tensor
    head: TeacherHead
    weights: Weights
    vocabulary_size: int


@dataclass(frozen=True)
class Tokens:
    """The student's logits at the head and the label, and the teacher as probabilities."""

    head_Nk: Tensor  # z of the head
    label_N: Tensor  # z of the label
    head_log_sum_N1: Tensor  # log Σ_head exp(z)
    softened_log_sum_N1: Tensor  # log Σ_head exp(z / T)
    teacher_Nk: Tensor  # p of the head
    bucket_N1: Tensor  # p of the bucket
    mass_N1: Tensor  # Σ p, one up to rounding; the gradient belongs to the value with it

    @classmethod
    def of(cls, logits_RL: Tensor, batch: Batch) -> Tokens:
        """Gather from the logits, in float32 (float64 for float64 logits)."""
        dtype = torch.float64 if logits_RL.dtype == torch.float64 else torch.float32
        head_Nk = logits_RL[batch.positions_N[:, None], batch.head.ids_Nk].to(dtype)
        teacher_Nk = batch.head.log_prob_Nk.to(dtype).exp()
        bucket_N1 = batch.head.tail_log_prob_N.to(dtype).exp()[:, None]
        return cls(
            head_Nk=head_Nk,
            label_N=logits_RL[batch.positions_N, batch.labels_N].to(dtype),
            head_log_sum_N1=_log_sum(head_Nk),
            softened_log_sum_N1=_log_sum(head_Nk / batch.weights.temperature),
            teacher_Nk=teacher_Nk,
            bucket_N1=bucket_N1,
            mass_N1=teacher_Nk.sum(-1, keepdim=True) + bucket_N1,
        )


def _log_sum(z_Nk: Tensor) -> Tensor:
    return z_Nk.logsumexp(-1, keepdim=True) if z_Nk.shape[1] else z_Nk.new_full((len(z_Nk), 1), -math.inf)
