"""Cached knowledge distillation as one pass over the logits: value and gradient of

    α · T² · KL(teacher_T ‖ student_T) + (1 - α) · CE(label, student_1)        (Hinton, Vinyals & Dean, 2015)

The teacher comes as a head of k tokens and one bucket for all others. With p the teacher and q the student at T,

    KL = Σ_head p (log p - log q) + p_tail (log p_tail - log q_tail),    q_tail = Σ of q outside the head

which bounds the full KL from below, and is the full KL when k = V (no tail). An empty bucket (p_tail = 0) leaves the
usual top-k loss: a renormalised teacher against the student's whole softmax.

One buffer of the logits' size holds the gradient, formed in the forward pass; there is no dense teacher and no other
[N, V] tensor. The work runs over blocks of positions that stay in a processor's cache: in float32 with 2 threads,
N = 1024, V = 49152 and k = 64 it takes 0.53 to 0.64 of the time of `torch.nn.functional.cross_entropy`, forward and
backward, at T = 1 to 8 (tests/bench/distillation_loss.py).

Shapes: B rows, S tokens, R = B · S, N positions, C positions of a block, V vocabulary, L >= V columns of the logits,
k tokens of the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teachercache.objective.blocks import Block, blocks
from teachercache.objective.operands import Batch, TeacherHead, Tokens, Weights


def distillation_sums(
    logits_BSL: Tensor,
    *,
    positions_N: Tensor,
    labels_N: Tensor,
    head: TeacherHead,
    weights: Weights,
    vocabulary_size: int,
    block_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over positions, in nats: (total, kl, ce); gradients flow from `total` alone, into `logits_BSL`.

    `positions_N` are indices into [B · S], rising; `labels_N` the tokens that follow. Columns from `vocabulary_size` on
    (a padded vocabulary) take no part and get a gradient of zero. Computes in float32, or float64 for float64 logits.
    Costs one buffer of the logits' size and type where a gradient is needed, else none. `block_bytes` (default: 2 MiB
    a thread on a CPU, 128 MiB elsewhere) trades cache misses against calls; results differ by rounding at most.
    """
    batch = Batch(positions_N, labels_N, head, weights, vocabulary_size)
    if torch.is_grad_enabled() and logits_BSL.requires_grad:
        return _Distillation.apply(logits_BSL, batch, block_bytes)  # type: ignore[no-untyped-call]
    return _totals(*_run(logits_BSL, None, batch, block_bytes), weights)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BSL: Tensor, batch: Batch, block_bytes: int | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.gradient_BSL = torch.empty_like(logits_BSL, memory_format=torch.contiguous_format)
        total, kl, ce = _totals(*_run(logits_BSL, ctx.gradient_BSL, batch, block_bytes), batch.weights)
        ctx.mark_non_differentiable(kl, ce)
        return total, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        if ctx.gradient_BSL is None:
            raise RuntimeError("the distillation loss keeps one gradient buffer: call backward once per forward")
        gradient_BSL, ctx.gradient_BSL = ctx.gradient_BSL, None
        return gradient_BSL.mul_(grad_total), None, None


def _totals(kl_N: Tensor, ce_N: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    kl, ce = kl_N.sum(), ce_N.sum()
    # A term without weight stays out: 0 · inf would make the loss nan where the student rules out a token.
    terms = [(weights.alpha * weights.temperature**2, kl), (1 - weights.alpha, ce)]
    return torch.stack([weight * term for weight, term in terms if weight]).sum(), kl, ce


def _run(
    logits_BSL: Tensor, gradient_BSL: Tensor | None, batch: Batch, block_bytes: int | None
) -> tuple[Tensor, Tensor]:
    """KL and CE by position, [N] each; fills the gradient of α·T²·KL + (1-α)·CE."""
    logits_RL = logits_BSL.reshape(-1, logits_BSL.shape[-1])
    gradient_RL = None if gradient_BSL is None else gradient_BSL.view(logits_RL.shape)
    if gradient_RL is not None:
        _clear_unused(gradient_RL, batch)
    tokens = Tokens.of(logits_RL, batch)
    kl_N, ce_N = torch.empty_like(tokens.label_N), torch.empty_like(tokens.label_N)
    for block in blocks(
        logits_RL,
        gradient_RL,
        positions_N=batch.positions_N,
        vocabulary_size=batch.vocabulary_size,
        dtype=tokens.label_N.dtype,
        spare=batch.weights.temperature != 1,
        block_bytes=block_bytes,
    ):
        kl_N[block.part], ce_N[block.part] = _block(block, tokens, batch, needs_gradient=gradient_RL is not None)
        block.write_back()
    return kl_N, ce_N


def _clear_unused(gradient_RL: Tensor, batch: Batch) -> None:
    """Zero what no position writes, and only that: to fill the whole buffer costs half as much as the loss."""
    unused_R = torch.ones(len(gradient_RL), dtype=torch.bool, device=gradient_RL.device)
    unused_R[batch.positions_N] = False
    gradient_RL.index_fill_(0, unused_R.nonzero()[:, 0], 0.0)
    gradient_RL[:, batch.vocabulary_size :] = 0.0


def _block(block: Block, tokens: Tokens, batch: Batch, *, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """KL and CE of one block, [C] each; leaves the gradient in `block.values_CV`."""
    part, temperature = block.part, batch.weights.temperature
    largest_C1 = block.exponentiate(batch.head.ids_Nk[part], temperature)
    sum_C1 = block.values_CV.sum(-1, keepdim=True)
    tail_C1 = largest_C1 + sum_C1.log()
    softened_C1 = torch.logaddexp(tail_C1, tokens.softened_log_sum_N1[part])
    log_sum_C1 = softened_C1
    if temperature != 1:
        hard_tail_C1 = largest_C1 * temperature + block.raise_to(temperature).log()
        log_sum_C1 = torch.logaddexp(hard_tail_C1, tokens.head_log_sum_N1[part])
    if needs_gradient:
        _scale_tail(block, tokens, batch.weights, largest_C1, sum_C1, softened_C1, log_sum_C1)
        _set_tokens(block, tokens, batch, softened_C1, log_sum_C1)
    return _kl(tokens, batch, part, tail_C1, softened_C1), log_sum_C1[:, 0] - tokens.label_N[part]


def _scale_tail(
    block: Block,
    tokens: Tokens,
    weights: Weights,
    largest_C1: Tensor,
    sum_C1: Tensor,
    softened_C1: Tensor,
    log_sum_C1: Tensor,
) -> None:
    """∂/∂z outside the head: αT (Σp · q - p_tail · q / q_tail) + (1-α) softmax(z), a factor per position and power."""
    temperature = weights.temperature
    inside_C1 = tokens.bucket_N1[block.part] / sum_C1.clamp_min(torch.finfo(sum_C1.dtype).tiny)
    overall_C1 = tokens.mass_N1[block.part] * (largest_C1 - softened_C1).exp()
    kl_scale_C1 = weights.alpha * temperature * (overall_C1 - inside_C1)
    ce_scale_C1 = (1 - weights.alpha) * (largest_C1 * temperature - log_sum_C1).exp()
    if temperature == 1:  # one exponential serves both terms
        block.scale(kl_scale_C1 + ce_scale_C1, None)
    else:
        block.scale(kl_scale_C1, ce_scale_C1 if weights.alpha < 1 else None)


def _set_tokens(block: Block, tokens: Tokens, batch: Batch, softened_C1: Tensor, log_sum_C1: Tensor) -> None:
    """∂/∂z in the head: αT (Σp · q - p) + (1-α) softmax(z); and -(1-α) at the label, wherever that is."""
    part, weights = block.part, batch.weights
    head_Ck = tokens.head_Nk[part]
    kl_Ck = (head_Ck / weights.temperature - softened_C1).exp_().mul_(tokens.mass_N1[part])
    kl_Ck.sub_(tokens.teacher_Nk[part]).mul_(weights.alpha * weights.temperature)
    gradient_Ck = kl_Ck.add_((head_Ck - log_sum_C1).exp_(), alpha=1 - weights.alpha)
    block.values_CV.scatter_(1, batch.head.ids_Nk[part], gradient_Ck)
    label_C1 = batch.labels_N[part, None]
    block.values_CV.scatter_add_(1, label_C1, torch.full_like(log_sum_C1, weights.alpha - 1))


def _kl(tokens: Tokens, batch: Batch, part: slice, tail_C1: Tensor, softened_C1: Tensor) -> Tensor:
    """KL of head and bucket by position, [C]."""
    log_q_Ck = tokens.head_Nk[part] / batch.weights.temperature - softened_C1
    head_Ck = _divergence(tokens.teacher_Nk[part], batch.head.log_prob_Nk[part], log_q_Ck)
    bucket_C1 = batch.head.tail_log_prob_N[part, None]
    tail_C1 = _divergence(tokens.bucket_N1[part], bucket_C1, tail_C1 - softened_C1)
    return head_Ck.sum(-1) + tail_C1[:, 0]


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), and 0 where p = 0, whatever q is there."""
    return torch.where(p > 0, p * (log_p.to(p.dtype) - log_q), 0.0)
