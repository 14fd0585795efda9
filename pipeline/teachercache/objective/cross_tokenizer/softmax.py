"""Losses of one softmax with their gradients in closed form: one exponential a logit, and one buffer that is kept.

Shapes: C positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = math.exp(-80)  # what less mass than this counts as, none included, as in caches


def label_terms(logits_CV: Tensor, labels_C: Tensor, begins_V: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of the labels, and log Σ p over the tokens of a set (None: not asked for), [C] each."""
    if begins_V is None:
        return _LabelTerms.apply(logits_CV, labels_C, None)[0], None
    ce_C, log_mass_C = _LabelTerms.apply(logits_CV, labels_C, begins_V.to(logits_CV.dtype))
    return ce_C, log_mass_C


def conditioned_kl(logits_CV: Tensor, target_CV: Tensor, among_V: Tensor) -> tuple[Tensor, Tensor]:
    """KL(target ‖ softmax over the tokens `among_V` alone), [C], and the softmax's mass on all others, detached.

    `target_CV` are probabilities of these tokens, each row's sum 1; a row of zeros stands for nothing to compare.
    """
    kl_C, others_C = _ConditionedKL.apply(logits_CV, target_CV, among_V.to(logits_CV.dtype))
    return kl_C, others_C


class _LabelTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, labels_C: Tensor, begins_V: Tensor | None) -> tuple[Tensor, Tensor]:
        label_C1 = logits_CV.gather(1, labels_C[:, None])
        largest_C1 = logits_CV.amax(-1, keepdim=True) if logits_CV.numel() else label_C1
        softmax_CV = (logits_CV - largest_C1).exp_()
        sum_C1 = softmax_CV.sum(-1, keepdim=True)
        softmax_CV /= sum_C1
        ce_C = (sum_C1.log() + largest_C1 - label_C1)[:, 0]
        mass_C = ce_C.new_ones(len(ce_C)) if begins_V is None else (softmax_CV @ begins_V).clamp_min(LEAST)
        ctx.save_for_backward(softmax_CV, labels_C, begins_V, mass_C)
        return ce_C, mass_C.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_C: Tensor, mass_slope_C: Tensor) -> tuple[Tensor, None, None]:
        softmax_CV, labels_C, begins_V, mass_C = ctx.saved_tensors
        if begins_V is None:
            gradient_CV = softmax_CV * slope_C[:, None]
        else:  # d log Σ_set p / dz = p (in the set / mass - 1)
            share_C = torch.where(mass_C > LEAST, mass_slope_C / mass_C, 0.0)
            gradient_CV = torch.outer(share_C, begins_V)
            gradient_CV += (slope_C - mass_slope_C)[:, None]
            gradient_CV *= softmax_CV
        gradient_CV.scatter_add_(1, labels_C[:, None], -slope_C[:, None])
        return gradient_CV, None, None


class _ConditionedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, target_CV: Tensor, among_V: Tensor) -> tuple[Tensor, Tensor]:
        largest_C1 = logits_CV.amax(-1, keepdim=True) if logits_CV.numel() else logits_CV[:, :1]
        softmax_CV = (logits_CV - largest_C1).exp_()
        sum_C = softmax_CV.sum(-1)
        softmax_CV *= among_V
        among_C = softmax_CV.sum(-1).clamp_min(torch.finfo(softmax_CV.dtype).tiny)
        softmax_CV /= among_C[:, None]
        mass_C = target_CV.sum(-1)
        log_sum_C = among_C.log() + largest_C1[:, 0]
        kl_C = (
            torch.xlogy(target_CV, target_CV).sum(-1) - torch.linalg.vecdot(target_CV, logits_CV) + log_sum_C * mass_C
        )
        softmax_CV *= mass_C[:, None]
        softmax_CV -= target_CV
        ctx.save_for_backward(softmax_CV)
        others_C = (1 - among_C / sum_C).clamp_min(0)
        ctx.mark_non_differentiable(others_C)
        return kl_C, others_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_C: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient_CV,) = ctx.saved_tensors
        return gradient_CV * slope_C[:, None], None, None
