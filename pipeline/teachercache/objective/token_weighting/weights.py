"""Hard positions count more: weights of positions from the entropy of what student or teacher expect there.

In each row (a segment, where a sequence holds several) of n positions with scores s,

    w_i = n · s_i^strength / Σ s_j^strength

so that a row weighs as much as it does without emphasis, whatever else is in its micro-batch, sequence or process. With `top`
only that share of a row's positions, those of the highest scores, counts at all; the loss of the others is not computed. Both
terms of the logits' loss are weighted, and what is logged of them; terms between layers are not.

What it costs, tests/bench/emphasis_cost.py measures: an entropy of the student is one more pass of its output layer, one of the
teacher the expansion of its tail.

    student-entropy   H(student): where the student is undecided
    teacher-entropy   H(teacher): where the text forks. Wang et al., "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive
                      Effective Reinforcement Learning for LLM Reasoning", 2025, learn from the fifth of all tokens with the
                      highest entropy alone, in reinforcement learning
    entropy-gap       max(0, H(student) - H(teacher)): what the student has yet to learn, without what nobody can know

To focus distillation on hard tokens: Xie et al., "LLM-Oriented Token-Adaptive Knowledge Distillation", 2025, who measure
difficulty by the divergence of the two, and move the selected share as training goes on; here the share is fixed.

Shapes: B rows, S tokens, N positions, G segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from teachercache.config import EmphasisConfig

ENTROPY_TEMPERATURE = 1.0  # of both sides, whatever the temperature of training; every cache has it
EFFECTIVE = "emphasis_effective"  # in the log: the share of positions that count, effectively


@dataclass(frozen=True)
class TokenWeights:
    """Weights of positions, and the sum over positions of their row's effective share, (Σw)² / Σw² / n."""

    weight_N: Tensor
    effective: Tensor


def emphasis_of(
    config: EmphasisConfig,
    segment_N: Tensor,
    *,
    student_entropy: Callable[[], Tensor],
    teacher_entropy: Callable[[], Tensor],
) -> TokenWeights:
    """Returns the weights that a recipe's emphasis gives to positions; entropies [N] are computed only where the score
    needs them.

    `segment_N` is rising: see `segments_of`.
    """
    match config.by:
        case "student-entropy":
            score_N = student_entropy()
        case "teacher-entropy":
            score_N = teacher_entropy()
        case "entropy-gap":
            score_N = student_entropy() - teacher_entropy()
    return position_weights(score_N, segment_N, strength=config.strength, top=config.top)


def position_weights(score_N: Tensor, segment_N: Tensor, *, strength: float, top: float | None = None) -> TokenWeights:
    """Weights in the scores' type; negative scores count as 0. `segment_N` is rising.

    Of equal scores `top` keeps the first ones, and at least one position of a row. Where all scores of a row are 0 those that
    it keeps weigh alike.
    """
    dtype, score_N = score_N.dtype, score_N.detach().double().clamp_min(0.0)
    place_N, count_G = segment_N.unique_consecutive(return_inverse=True, return_counts=True)[1:]
    largest_G = score_N.new_zeros(len(count_G)).scatter_reduce(0, place_N, score_N, "amax")
    # In units of the largest: no power of it underflows or overflows.
    weight_N = (score_N / largest_G.clamp_min(torch.finfo(score_N.dtype).tiny)[place_N]) ** strength
    weight_N = torch.where(largest_G[place_N] > 0, weight_N, 1.0)
    if top is not None:
        weight_N = weight_N * _highest(score_N, place_N, count_G, top)
    sum_G = weight_N.new_zeros(len(count_G)).index_add(0, place_N, weight_N)
    weight_N = weight_N * (count_G / sum_G)[place_N]
    squares_G = weight_N.new_zeros(len(count_G)).index_add(0, place_N, weight_N**2)
    return TokenWeights(weight_N.to(dtype), (count_G**2 / squares_G).sum())


def _highest(score_N: Tensor, place_N: Tensor, count_G: Tensor, top: float) -> Tensor:
    """Marks the positions that are among the highest of their segment, bool [N]."""
    order_N = score_N.argsort(descending=True, stable=True)
    order_N = order_N[place_N[order_N].argsort(stable=True)]  # segment by segment, highest first
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    first_G = count_G.cumsum(0) - count_G
    kept_G = (count_G * top - 1e-9).ceil()  # 0.07 · 100 is a little more than 7
    return rank_N - first_G[place_N] < kept_G[place_N]


def segments_of(shift_labels_BS: Tensor, position_ids_BS: Tensor | None) -> Tensor:
    """The number of each token's segment, [B, S], rising from row to row: one a row, or, where positions are given, one
    wherever they begin anew."""
    begins_BS = torch.zeros_like(shift_labels_BS, dtype=torch.bool)
    begins_BS[:, :1] = True
    if position_ids_BS is not None:
        begins_BS[:, 1:] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    return begins_BS.reshape(-1).cumsum(0).view_as(begins_BS)
