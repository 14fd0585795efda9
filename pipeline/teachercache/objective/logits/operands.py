"""Operands of the loss: its weights, the others, and the student's logits at single tokens.

Shapes: B rows, S tokens, R = B · S; L columns of the logits; N positions, k tokens of the head. Log-probabilities in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teachercache.objective.logits.divergences import Divergence
from teachercache.targets.logits.softened import Softened
from teachercache.tasks.contract import NO_TARGET


def labelled_positions(shift_labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Rising indices into [B · S] of what has a label, and the labels, [N] each."""
    labels_R = shift_labels_BS.reshape(-1)
    positions_N = (labels_R != NO_TARGET).nonzero()[:, 0]
    return positions_N, labels_R[positions_N]


def no_teacher(labels_N: Tensor, dtype: torch.dtype) -> Softened:
    """k = 0 and everything in the bucket, so that the divergence is 0 whatever the student does."""
    none_N0 = labels_N.new_empty(len(labels_N), 0)
    return Softened(none_N0, none_N0.to(dtype), torch.zeros(len(labels_N), dtype=dtype, device=labels_N.device))


@dataclass(frozen=True)
class Weights:
    """α and T of the loss (without a teacher α = 0 and T = 1), and the weights of further terms by their names."""

    alpha: float
    temperature: float
    terms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """All operands of the loss but for the dense logits."""

    positions_N: Tensor  # indices into R, rising
    labels_N: Tensor
    teacher: Softened
    divergence: Divergence
    weights: Weights
    position_weight_N: Tensor | None  # None: 1 each
    vocabulary_size: int
    consecutive: bool = False  # positions are all of R, one after the other


@dataclass(frozen=True)
class Tokens:
    """The student's logits at the head and the label, and the teacher as probabilities."""

    head_Nk: Tensor  # z of the head, -inf for padding
    label_N: Tensor  # z of the label
    head_log_sum_N1: Tensor  # log Σ_head exp(z)
    softened_log_sum_N1: Tensor  # log Σ_head exp(z / T)
    log_teacher_Nk: Tensor  # log p of the head
    log_bucket_N1: Tensor  # log p of all other tokens together
    teacher_Nk: Tensor  # p of the head
    bucket_N1: Tensor  # p of all other tokens together

    @classmethod
    def of(cls, logits_RL: Tensor, batch: Batch) -> Tokens:
        """Gather from the logits, in float32 (float64 for float64 logits)."""
        dtype = torch.float64 if logits_RL.dtype == torch.float64 else torch.float32
        ids_Nk = batch.teacher.head_ids_Nk
        head_Nk = logits_RL[batch.positions_N[:, None], ids_Nk].to(dtype)
        # Padding repeats a position's first token, which must count once: its own q is 0, like its p.
        head_Nk[:, 1:].masked_fill_(ids_Nk[:, 1:] == ids_Nk[:, :1], -math.inf)
        log_teacher_Nk = batch.teacher.head_log_prob_Nk.to(dtype)
        log_bucket_N1 = batch.teacher.tail_log_prob_N.to(dtype)[:, None]
        return cls(
            head_Nk=head_Nk,
            label_N=logits_RL[batch.positions_N, batch.labels_N].to(dtype),
            head_log_sum_N1=_log_sum(head_Nk),
            softened_log_sum_N1=_log_sum(head_Nk / batch.weights.temperature),
            log_teacher_Nk=log_teacher_Nk,
            log_bucket_N1=log_bucket_N1,
            teacher_Nk=log_teacher_Nk.exp(),
            bucket_N1=log_bucket_N1.exp(),
        )


def _log_sum(z_Nk: Tensor) -> Tensor:
    return z_Nk.logsumexp(-1, keepdim=True) if z_Nk.shape[1] else z_Nk.new_full((len(z_Nk), 1), -math.inf)
