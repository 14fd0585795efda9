"""Weights of several teachers at a position.

    fixed                 the recipe's weights, of each domain its own
    confidence            by how likely each teacher finds the token that really follows:
                          w_i = (1 - exp(CE_i) / Σ_j exp(CE_j)) / (K - 1), with CE_i = -log p_i(actual) at T = 1.
                          Zhang, Chen & Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", 2022 (CA-MKD)
    validation            softmax(-loss_i / tau) of the teachers' mean cross-entropies on held-out rows. A cache is a frozen
                          teacher: its losses are the same at every evaluation, and so are these weights
    validation-student    softmax(-KL(teacher_i ‖ student) / tau) on held-out rows, taken anew at every evaluation: the student
                          turns to those whose distributions it can follow by now

All but the first multiply the recipe's weights, which are equal by default. Where a teacher is silent, because its cache lacks
the row or none of its tokens begins there, the others share its weight as they share theirs.

Shapes: N positions, K teachers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST = 1e-6  # of the first teacher's weight where others must be completed by it


class TeacherWeights:
    """The part of the weights that all positions share. What adapts in it (`adapts`) belongs in a checkpoint."""

    def __init__(self, teachers: int, *, tau: float = 1.0, adapts: bool = False) -> None:
        self.tau, self.adapts = tau, adapts
        self.factors: tuple[float, ...] = (1.0,) * teachers

    def update(self, losses: Sequence[float]) -> None:
        """From losses of the teachers, nats per position, the same in every process."""
        least = min(losses)
        shares = [math.exp((least - loss) / self.tau) for loss in losses]
        self.factors = tuple(share / sum(shares) for share in shares)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"factors": list(self.factors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.factors = tuple(float(factor) for factor in state["factors"])


def by_confidence(nats_NK: Tensor, speaks_NK: Tensor) -> Tensor:
    """CA-MKD's weights [N, K] from -log p(actual), among the teachers that speak; one that speaks alone has all."""
    share_NK = nats_NK.masked_fill(~speaks_NK, -math.inf).softmax(-1)
    others_N1 = speaks_NK.sum(-1, keepdim=True) - 1
    weight_NK = (1 - share_NK) / others_N1.clamp_min(1)
    return torch.where(speaks_NK, torch.where(others_N1 > 0, weight_NK, 1.0), 0.0)


def shared_out(weight_NK: Tensor, speaks_NK: Tensor) -> Tensor:
    """Weights of those that speak, scaled to a sum of 1; a sum of 0 stays."""
    weight_NK = weight_NK * speaks_NK
    sum_N1 = weight_NK.sum(-1, keepdim=True)
    return weight_NK / sum_N1.clamp_min(torch.finfo(weight_NK.dtype).tiny)


def with_a_base(weight_NK: Tensor, native: Sequence[bool]) -> Tensor:
    """Something for the first teacher where only such with other vocabularies have a weight: it completes what they say."""
    if all(native):
        return weight_NK
    speaks_alone_N = (weight_NK[:, torch.tensor(native)].sum(-1) < LEAST) & (weight_NK.sum(-1) > 0)
    first_N = torch.where(speaks_alone_N, LEAST, weight_NK[:, 0])
    return torch.cat([first_N[:, None], weight_NK[:, 1:]], dim=1)
