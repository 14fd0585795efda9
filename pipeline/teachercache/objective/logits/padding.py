"""Padding columns beyond the vocabulary under a divergence: outcomes of their own, of which the teacher has p = 0.

    forward-kl          nothing by itself: q is smaller for all tokens by what padding has
    reverse-kl          q · (log q - log p), p as small as counts (`divergences.LEAST_LOG_PROB`)
    jensen-shannon      what any token has that the teacher rules out
    total-variation     q / 2

Shapes: C positions, P columns of padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teachercache.objective.logits.divergences import Divergence, forward_kl


def padding_terms(divergence: Divergence, log_q_CP: Tensor) -> tuple[Tensor, Tensor] | None:
    """Its contributions to the divergence and their pulls, [C, P] each; None where all of them are 0."""
    if divergence is forward_kl or not log_q_CP.shape[1]:
        return None
    nothing_CP = torch.zeros_like(log_q_CP)
    return divergence(nothing_CP, torch.full_like(log_q_CP, -math.inf), log_q_CP.exp(), log_q_CP)
