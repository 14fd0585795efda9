"""Approximate likelihood matching: chunks are as likely under the student as under the teacher.

    KL(Bernoulli(p_T) ‖ Bernoulli(p_S)) · τ,  p = P(chunk)^(1/τ)

With `boundaries` a chunk's probability is that of its tokens *and of a new pre-token after them*: tokens alone favour
whichever side cuts the bytes into fewer of them. As τ grows the loss tends to x_S - x_T + x_T · log(x_T / x_S) with
x = -log P, which still tells likely from unlikely where p^1 is 1e-9 on both sides.

Source: Minixhofer, Ponti & Vulić, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching", 2025.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teachercache.objective.cross_tokenizer.batch import Chunks

LEAST = 1e-6  # nats: a chunk that is certain has an infinite slope


@dataclass(frozen=True)
class ChunkLikelihood:
    """The term; `tau` is the binarisation temperature."""

    weight: float = 1.0
    tau: float = 100.0
    boundaries: bool = True
    name: str = "chunk-likelihood"

    def values(self, log_prob_M: Tensor, boundary_M: Tensor | None, chunks: Chunks) -> Tensor:
        """See `ChunkTerm`."""
        teacher_M = chunks.log_prob_M.to(log_prob_M)
        if self.boundaries:
            assert boundary_M is not None
            log_prob_M = log_prob_M + boundary_M
            teacher_M = teacher_M + chunks.boundary_M.to(log_prob_M)
        return self.tau * binary_kl(teacher_M / self.tau, log_prob_M / self.tau)


def binary_kl(log_p_M: Tensor, log_q_M: Tensor) -> Tensor:
    """KL between two yes-or-no outcomes from the log-probabilities of yes, nats."""
    log_p_M, log_q_M = (values.clamp(max=-LEAST) for values in (log_p_M, log_q_M))
    yes_M = log_p_M.exp() * (log_p_M - log_q_M)
    return yes_M - torch.expm1(log_p_M) * (log1mexp(log_p_M) - log1mexp(log_q_M))


def log1mexp(log_p_M: Tensor) -> Tensor:
    """log(1 - p) from log p < 0 (Mächler, "Accurately computing log(1 - exp(-|a|))", 2012)."""
    likely_M = log_p_M > -math.log(2)
    # Both branches are differentiated: what the other one takes must be finite.
    near = torch.log(-torch.expm1(torch.where(likely_M, log_p_M, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(likely_M, -1.0, log_p_M)))
    return torch.where(likely_M, near, far)
