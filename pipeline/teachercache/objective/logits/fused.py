"""Cached knowledge distillation as one pass over the logits: value and gradient of

    Σ over positions of  weight · (α · T² · D(teacher_T, student_T) + (1 - α) · CE(label, student_1))

for any divergence D of `divergences.py`, after Hinton, Vinyals & Dean, 2015. A teacher whose tail is one bucket goes
through `bucketed.py`, one that gives every token a share through `dense.py`.

Columns beyond the vocabulary, to which output layers are often padded, belong to the student's softmax like any other, as
in plain cross-entropy: whoever samples from it samples from them too. No token stands for them, so that the teacher gives each
of them nothing (`padding.py`), and training takes away what mass they have.

One buffer of the logits' size holds the gradient, formed in the forward pass; there is no dense teacher and no other
[N, V] tensor: the work runs over blocks of positions that stay in a processor's cache.

Shapes: B rows, S tokens, R = B · S, N positions, C positions of a block, V vocabulary, L >= V columns of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teachercache.objective.logits.blocks import blocks
from teachercache.objective.logits.bucketed import BucketedLoss
from teachercache.objective.logits.dense import DenseLoss
from teachercache.objective.logits.divergences import Divergence, forward_kl
from teachercache.objective.logits.operands import Batch, Tokens, Weights
from teachercache.targets.logits.softened import Softened


def distillation_sums(
    logits_BSL: Tensor,
    *,
    positions_N: Tensor,
    labels_N: Tensor,
    teacher: Softened,
    weights: Weights,
    vocabulary_size: int,
    divergence: Divergence = forward_kl,
    position_weight_N: Tensor | None = None,
    block_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over positions, in nats: (total, divergence, ce); gradients flow from `total` alone, into `logits_BSL`.

    `positions_N` are indices into [B · S], rising; `labels_N` the tokens that follow; `position_weight_N` (default: 1)
    multiplies a position in all three sums, so that total = α · T² · divergence + (1 - α) · ce. `vocabulary_size` is the
    teacher's: columns from there on are padding, of which it has p = 0. Computes in float32, or float64 for float64 logits.
    Costs one buffer of the logits' size and type where a gradient is needed, else none.
    `block_bytes` (default: 2 MiB a thread on a CPU, 128 MiB elsewhere) trades cache misses against calls; results differ
    by rounding at most.
    """
    batch = Batch(positions_N, labels_N, teacher, divergence, weights, position_weight_N, vocabulary_size)
    with torch.autocast(logits_BSL.device.type, enabled=False):  # it would take dot products to half precision
        return _sums(logits_BSL, batch, block_bytes)


def _sums(logits_BSL: Tensor, batch: Batch, block_bytes: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and logits_BSL.requires_grad:
        sums: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(logits_BSL, batch, block_bytes)
        return sums
    return totals(*run(logits_BSL, None, batch, block_bytes), batch)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BSL: Tensor, batch: Batch, block_bytes: int | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.gradient_BSL = torch.empty_like(logits_BSL, memory_format=torch.contiguous_format)
        total, divergence, ce = totals(*run(logits_BSL, ctx.gradient_BSL, batch, block_bytes), batch)
        ctx.mark_non_differentiable(divergence, ce)
        return total, divergence, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        if ctx.gradient_BSL is None:
            raise RuntimeError("the distillation loss keeps one gradient buffer: call backward once per forward")
        gradient_BSL, ctx.gradient_BSL = ctx.gradient_BSL, None
        return gradient_BSL.mul_(grad_total), None, None


def totals(divergence_N: Tensor, ce_N: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(total, divergence, ce) from what each position has, unweighted."""
    if batch.position_weight_N is not None:
        divergence_N, ce_N = (values_N * batch.position_weight_N for values_N in (divergence_N, ce_N))
    divergence, ce = divergence_N.sum(), ce_N.sum()
    weights = batch.weights
    # A term without weight stays out: 0 · inf would make the loss nan where the student rules out a token.
    terms = [(weights.alpha * weights.temperature**2, divergence), (1 - weights.alpha, ce)]
    return torch.stack([weight * term for weight, term in terms if weight]).sum(), divergence, ce


def run(
    logits_BSL: Tensor, gradient_BSL: Tensor | None, batch: Batch, block_bytes: int | None
) -> tuple[Tensor, Tensor]:
    """Divergence and CE by position, [N] each, unweighted; fills the gradient of the weighted total."""
    logits_RL = logits_BSL.reshape(-1, logits_BSL.shape[-1])
    gradient_RL = None if gradient_BSL is None else gradient_BSL.view(logits_RL.shape)
    if gradient_RL is not None:
        _clear_unused(gradient_RL, batch)
    tokens = Tokens.of(logits_RL, batch)
    kind = BucketedLoss if batch.teacher.tail is None else DenseLoss
    loss = kind(tokens, batch, needs_gradient=gradient_RL is not None)
    divergence_N, ce_N = torch.empty_like(tokens.label_N), torch.empty_like(tokens.label_N)
    for block in blocks(
        logits_RL,
        gradient_RL,
        positions_N=batch.positions_N,
        vocabulary_size=batch.vocabulary_size,
        dtype=tokens.label_N.dtype,
        block_bytes=block_bytes,
        consecutive=batch.consecutive,
    ):
        divergence_N[block.part], ce_N[block.part] = loss(block)
        if gradient_RL is not None and batch.position_weight_N is not None:
            block.values_CL.mul_(batch.position_weight_N[block.part, None])
        block.write_back()
    return divergence_N, ce_N


def _clear_unused(gradient_RL: Tensor, batch: Batch) -> None:
    """Zero what no position writes, and only that: to fill the whole buffer costs half as much as the loss."""
    if not batch.consecutive:
        unused_R = torch.ones(len(gradient_RL), dtype=torch.bool, device=gradient_RL.device)
        unused_R[batch.positions_N] = False
        gradient_RL.index_fill_(0, unused_R.nonzero()[:, 0], 0.0)
