"""One block of the loss against a teacher that gives every token of the vocabulary its own share.

The head's tokens have their own log-probabilities; the others share the tail's mass as the softmax of its logits t,

    log p = t - log Σ_tail exp(t) + log p_tail.

Forward KL never forms log p: Σ_tail p (log p - log q) is p_tail times a dot product of softmax(t) and t - z / T, plus
scalars. `torch.softmax` works on a row while it lies in a core's own cache, more than twice as fast as its steps as calls
of their own; and log Σ exp(z) follows from the largest z and the largest q.

A position without any mass, no head and an empty tail, has no teacher there: its divergence is 0.

What a training step costs with it, beside one of plain cross-entropy, tests/bench/divergence_step.py measures.

Shapes: C positions of a block, L columns, the first V of which are the vocabulary and the other P padding; k tokens of the
head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from teachercache.objective.logits.blocks import Block, squarings_of
from teachercache.objective.logits.divergences import forward_kl
from teachercache.objective.logits.operands import Batch, Tokens
from teachercache.objective.logits.padding import padding_terms
from teachercache.objective.logits.tail_logits import TailLogits
from teachercache.targets.logits.softened import put_head

# Stands for -inf among the tail's logits: the same zero share, but 0 · it is 0, and an empty tail is no nan.
NOTHING = -1e30

# Divergence [C], Σ pull [C, 1], and the pulls of the vocabulary [C, V] and, unless they are 0, of padding [C, P].
Diverged = tuple[Tensor, Tensor, Sequence[Tensor]]


class DenseLoss:
    """Divergence and CE of a block, [C] each, unweighted; leaves the gradient in `block.values_CL`."""

    def __init__(self, tokens: Tokens, batch: Batch, *, needs_gradient: bool) -> None:
        assert batch.teacher.tail is not None
        self.tokens, self.batch, self.needs_gradient = tokens, batch, needs_gradient
        positions = len(batch.positions_N)
        self._tail = TailLogits(batch.teacher.tail, positions=positions, vocabulary_size=batch.vocabulary_size)

    def __call__(self, block: Block) -> tuple[Tensor, Tensor]:
        """A softmax each of student and teacher, and a few passes."""
        temperature = self.batch.weights.temperature
        largest_C1, softened_C1 = _soften(block, temperature)
        tail_CV = self._tail.of(block.part, block.values_CL)
        diverge = self._forward_kl if self.batch.divergence is forward_kl else self._diverge
        divergence_C, mass_C1, pulls = diverge(block, tail_CV, softened_C1)
        log_sum_C1, hard_sum_C1 = softened_C1, torch.ones_like(softened_C1)
        if temperature != 1:
            log_sum_C1, hard_sum_C1 = _harden(block, temperature, largest_C1, softened_C1)
        if self.needs_gradient:
            self._combine(block, mass_C1, pulls, hard_sum_C1)
        return divergence_C, log_sum_C1[:, 0] - self.tokens.label_N[block.part]

    def _forward_kl(self, block: Block, tail_CV: Tensor, softened_C1: Tensor) -> Diverged:
        """KL [C], Σ p [C, 1] and p [C, V]; overwrites the tail's logits."""
        tokens, part, temperature = self.tokens, block.part, self.batch.weights.temperature
        p_Ck, p_tail_C1, log_tail_C1 = tokens.teacher_Nk[part], tokens.bucket_N1[part], tokens.log_bucket_N1[part]
        share_CV, log_tail_sum_C1 = self._tail_share(block, tail_CV)
        tail_CV.sub_(block.logits_CV, alpha=1 / temperature)
        # Where both are at nothing, the student for good and the teacher by underflow, 0 · inf stands for inf.
        gap_C1 = torch.linalg.vecdot(share_CV, tail_CV)[:, None].nan_to_num(nan=math.inf, posinf=math.inf)
        gap_C1 = gap_C1 + log_tail_C1 - log_tail_sum_C1 + softened_C1
        log_q_Ck = tokens.head_Nk[part] / temperature - softened_C1
        head_Ck, _ = forward_kl(p_Ck, tokens.log_teacher_Nk[part], log_q_Ck.exp(), log_q_Ck)
        kl_C = head_Ck.sum(-1) + torch.where(p_tail_C1 > 0, p_tail_C1 * gap_C1, 0.0)[:, 0]
        p_CV = share_CV.mul_(p_tail_C1).scatter_add_(1, self.batch.teacher.head_ids_Nk[part], p_Ck)
        return kl_C, p_Ck.sum(-1, keepdim=True) + p_tail_C1, (p_CV,)

    def _diverge(self, block: Block, tail_CV: Tensor, softened_C1: Tensor) -> Diverged:
        """Any divergence [C], Σ pull [C, 1] and the pulls; overwrites the tail's logits."""
        part = block.part
        share_CV, log_tail_sum_C1 = self._tail_share(block, tail_CV)
        log_p_CV = tail_CV.add_(self.tokens.log_bucket_N1[part] - log_tail_sum_C1)
        put_head(log_p_CV, self.batch.teacher.head_ids_Nk[part], self.tokens.log_teacher_Nk[part])
        p_CV = torch.exp(log_p_CV, out=share_CV)
        log_q_CV = block.logits_CV.to(p_CV.dtype) / self.batch.weights.temperature - softened_C1
        of_tokens = self.batch.divergence(p_CV, log_p_CV, block.values_CV, log_q_CV)
        of_padding = padding_terms(
            self.batch.divergence, block.logits_CP / self.batch.weights.temperature - softened_C1
        )
        parts = [of_tokens] if of_padding is None else [of_tokens, of_padding]
        if not self.batch.teacher.head_ids_Nk.shape[1]:  # else some token of the head has mass
            untaught_C1 = self.tokens.log_bucket_N1[part] == -math.inf
            parts = [(value.masked_fill(untaught_C1, 0.0), pull.masked_fill(untaught_C1, 0.0)) for value, pull in parts]
        divergence_C = torch.stack([value_CA.sum(-1) for value_CA, _ in parts]).sum(0)
        mass_C1 = torch.stack([pull_CA.sum(-1, keepdim=True) for _, pull_CA in parts]).sum(0)
        return divergence_C, mass_C1, [pull_CA for _, pull_CA in parts]

    def _tail_share(self, block: Block, tail_CV: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(t) over the tokens outside the head, 0 inside, and log Σ exp(t), [C, 1]."""
        tail_CV.scatter_(1, self.batch.teacher.head_ids_Nk[block.part], NOTHING)
        share_CV = block.scratch.share_CV[: len(tail_CV)]
        torch.softmax(tail_CV, -1, out=share_CV)
        return share_CV, _largest(tail_CV) - _largest(share_CV).log()

    def _combine(self, block: Block, mass_C1: Tensor, pulls: Sequence[Tensor], hard_sum_C1: Tensor) -> None:
        """∂/∂z = αT (q · Σ pull - pull) + (1-α) (softmax(z) - 1 at the label)."""
        alpha, temperature = self.batch.weights.alpha, self.batch.weights.temperature
        ce_scale_C1 = (1 - alpha) / hard_sum_C1
        if temperature == 1:
            block.scale(alpha * mass_C1 + ce_scale_C1, None)
        else:
            block.scale(alpha * temperature * mass_C1, ce_scale_C1 if alpha < 1 else None)
        for values_CA, pull_CA in zip((block.values_CV, block.values_CP), pulls, strict=False):
            values_CA.sub_(pull_CA, alpha=alpha * temperature)
        block.add_at(self.batch.labels_N[block.part, None], torch.full_like(mass_C1, alpha - 1))


def _soften(block: Block, temperature: float) -> tuple[Tensor, Tensor]:
    """values = softmax(z / T) over all columns; returns the largest z / T and log Σ exp(z / T), each [C, 1]."""
    scaled_CL = block.logits_CL
    if scaled_CL.dtype != block.values_CL.dtype:
        scaled_CL = block.spare_CL.copy_(scaled_CL).mul_(1 / temperature)
    elif temperature != 1:
        scaled_CL = torch.mul(scaled_CL, 1 / temperature, out=block.spare_CL)
    torch.softmax(scaled_CL, -1, out=block.values_CL)
    largest_C1 = _largest(scaled_CL)
    return largest_C1, largest_C1 - _largest(block.values_CL).log()


def _harden(block: Block, temperature: float, largest_C1: Tensor, softened_C1: Tensor) -> tuple[Tensor, Tensor]:
    """spare = exp(z) up to a factor; returns log Σ exp(z) and the sum of spare, each [C, 1]."""
    squarings, spare_CL = squarings_of(temperature), block.spare_CL
    if not squarings:
        torch.softmax(block.logits_CL, -1, dtype=spare_CL.dtype, out=spare_CL)
        return largest_C1 * temperature - _largest(spare_CL).log(), torch.ones_like(largest_C1)
    torch.mul(block.values_CL, (softened_C1 - largest_C1).exp(), out=spare_CL)  # the largest is 1: no underflow there
    for _ in range(squarings):
        spare_CL.mul_(spare_CL)
    sum_C1 = spare_CL.sum(-1, keepdim=True)
    return largest_C1 * temperature + sum_C1.log(), sum_C1


def _largest(values_CV: Tensor) -> Tensor:
    return values_CV.amax(-1, keepdim=True)
