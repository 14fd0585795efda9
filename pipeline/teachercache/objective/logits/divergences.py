"""Divergences of a student's distribution q from the teacher's p: four of them, outcome by outcome.

    forward-kl          Σ p log(p / q)                                   covers the teacher's modes (Hinton et al., 2015)
    reverse-kl          Σ q log(q / p)                                   seeks one of them (Gu et al., "MiniLLM", 2023)
    jensen-shannon      β KL(p ‖ m) + (1-β) KL(q ‖ m), m = βp + (1-β)q   between the two (Agarwal et al., "GKD", 2023)
    total-variation     ½ Σ |p - q|                                      bounded (Wen et al., "f-Divergence Minimization", 2023)

The gradient needs one number for each outcome a: its *pull* -q_a ∂D/∂q_a. With q = softmax(z / T),

    ∂D/∂z_v = (q_v · Σ pull - pull_v) / T

and a bucket's pull is shared out among its tokens as q is. Written this way nothing is divided by a q that may be 0.

Shapes: C positions, A outcomes: tokens, or tokens and a bucket. Log-probabilities in nats, -inf for p = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig

# Reverse KL is infinite where the student puts mass and the teacher has none. A teacher's p counts at least as float32's
# smallest normal number, 1e-38: the cost of such an outcome is then q · 87 nats, and its gradient finite.
LEAST_LOG_PROB = math.log(torch.finfo(torch.float32).tiny)

# (p, log p, q, log q), each [C, A] -> contributions to D and pulls, each [C, A].
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(p_CA: Tensor, log_p_CA: Tensor, q_CA: Tensor, log_q_CA: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q). What the teacher rules out counts 0, whatever q is there."""
    return torch.where(p_CA > 0, p_CA * (log_p_CA - log_q_CA), 0.0), p_CA


def reverse_kl(p_CA: Tensor, log_p_CA: Tensor, q_CA: Tensor, log_q_CA: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p), with p no smaller than exp(`LEAST_LOG_PROB`)."""
    log_ratio_CA = log_q_CA - log_p_CA.clamp_min(LEAST_LOG_PROB)
    value_CA = torch.where(q_CA > 0, q_CA * log_ratio_CA, 0.0)
    return value_CA, -value_CA  # the derivative's other term, q · 1, cancels: Σ q = 1


@dataclass(frozen=True)
class JensenShannon:
    """Generalised Jensen-Shannon divergence; `mixing` is β in (0, 1), ½ the symmetric one."""

    mixing: float = 0.5

    def __call__(self, p_CA: Tensor, log_p_CA: Tensor, q_CA: Tensor, log_q_CA: Tensor) -> tuple[Tensor, Tensor]:
        """At most log 2 at β = ½; finite whatever either side rules out."""
        log_m_CA = torch.logaddexp(log_p_CA + math.log(self.mixing), log_q_CA + math.log1p(-self.mixing))
        of_p_CA = torch.where(p_CA > 0, p_CA * (log_p_CA - log_m_CA), 0.0)
        of_q_CA = torch.where(q_CA > 0, q_CA * (log_q_CA - log_m_CA), 0.0).mul_(1 - self.mixing)
        return of_p_CA.mul_(self.mixing).add_(of_q_CA), -of_q_CA


def total_variation(p_CA: Tensor, log_p_CA: Tensor, q_CA: Tensor, log_q_CA: Tensor) -> tuple[Tensor, Tensor]:
    """½ Σ |p - q|; where p = q the subgradient 0 is taken."""
    excess_CA = (p_CA - q_CA) / 2
    return excess_CA.abs(), excess_CA.sign().mul_(q_CA / 2)


def divergence_of(config: ObjectiveConfig) -> Divergence:
    """The divergence that a recipe asks for."""
    named: dict[str, Divergence] = {
        "forward-kl": forward_kl,
        "reverse-kl": reverse_kl,
        "jensen-shannon": JensenShannon(config.mixing),
        "total-variation": total_variation,
    }
    return named[config.divergence]
