"""Losses between one block's maps and another's, with the gradient in the same pass.

    kl    Σ over keys of p log (p / q)          its gradient at the student's scores: q Σp - p
    mse   Σ over keys of (p - q)²               and 2 q (q - p - Σ q (q - p))

p are the teacher's maps as the student's heads have them, q the student's; both with means over heads, sums over positions.
Maps are formed a chunk of queries at a time, over the keys from the first that the window of any of them has to its last
query, and once: what is kept for the backward pass are the gradients of queries and keys, linear in the length of a row.

Shapes: B rows, S tokens, C queries of a chunk, T keys of it, H heads of the teacher, h of the student, K of
its keys, G = h / K, E a head's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teachercache.objective.layers.heads import mixed
from teachercache.targets.layers.attention import TaughtAttention

CPU_CHUNK_BYTES = 2 * 2**20  # a thread, of one map [B, h, C, S], float32: a few of them stay in the processor's cache
DEVICE_CHUNK_BYTES = 64 * 2**20
FEWEST = 8  # queries of a chunk, however long the row: below it, calls cost more than what they compute
SMALLEST = 1e-30  # below it a probability counts as 0
Distance = Literal["kl", "mse"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Operands beside the student's queries and keys. `sees` gives of some queries and some keys (slices) which keys
    count, bool [B, C, T]: none beyond the query, with a `window` none but the query and the `window - 1` before it."""

    distance: Distance
    teacher: TaughtAttention
    sees: Callable[[slice, slice], Tensor]
    mask_BS: Tensor  # bool: queries that count
    scaling: float
    softcap: float | None = None
    window: int | None = None


def map_loss(queries_BhSE: Tensor, keys_BKSE: Tensor, weights_hH: Tensor | None, what: Comparison) -> Tensor:
    """A scalar, float32, differentiable once in queries, keys and the weights that mix the teacher's heads (None: they are the
    student's own, one to one)."""
    with torch.autocast(queries_BhSE.device.type, enabled=False):
        total: Tensor = _MapLoss.apply(queries_BhSE, keys_BKSE, weights_hH, what)
    return total


class _MapLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_BhSE: Tensor, keys_BKSE: Tensor, weights_hH: Tensor | None, what: Comparison
    ) -> Tensor:
        # By key head, so that heads which share keys are one product with them.
        queries_BKGSE = queries_BhSE.float().unflatten(1, (keys_BKSE.shape[1], -1))
        keys_BKSE_float = keys_BKSE.float()
        of_states = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        to_queries = torch.zeros_like(queries_BKGSE) if of_states else None
        to_keys = torch.zeros_like(keys_BKSE_float) if of_states else None
        to_weights = torch.zeros_like(weights_hH) if weights_hH is not None and ctx.needs_input_grad[2] else None
        total: Tensor = queries_BKGSE.new_zeros(())
        for part, reach in _parts(queries_BhSE, what):
            few_BKXE = queries_BKGSE[:, :, :, part].flatten(2, 3)
            reached_BKTE = keys_BKSE_float[:, :, reach]
            chunk = _Chunk.of(few_BKXE @ reached_BKTE.transpose(-1, -2), what, (part, reach), weights_hH)
            total += chunk.loss()
            if to_queries is not None and to_keys is not None:
                scores_BKXT = chunk.to_scores().unflatten(1, (keys_BKSE.shape[1], -1)).flatten(2, 3)
                to_queries[:, :, :, part] = (scores_BKXT @ reached_BKTE).unflatten(2, (-1, part.stop - part.start))
                to_keys[:, :, reach] += scores_BKXT.transpose(-1, -2) @ few_BKXE
            if to_weights is not None:
                to_weights += chunk.to_weights()
        ctx.save_for_backward(None if to_queries is None else to_queries.flatten(1, 2), to_keys, to_weights)
        ctx.types = (queries_BhSE.dtype, keys_BKSE.dtype, torch.float32)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled before they are cast: in float16 most of them would be zero without the loss scale.
        scaled = (None if grad is None else grad * grad_total for grad in ctx.saved_tensors)
        return (*(grad if grad is None else grad.to(kind) for grad, kind in zip(scaled, ctx.types, strict=True)), None)


def _parts(queries_BhSE: Tensor, what: Comparison) -> Iterator[tuple[slice, slice]]:
    """Queries of each chunk, and the keys that any of them may see."""
    rows, heads, length, _ = queries_BhSE.shape
    on_cpu = queries_BhSE.device.type == "cpu"
    chunk_bytes = CPU_CHUNK_BYTES * torch.get_num_threads() if on_cpu else DEVICE_CHUNK_BYTES
    pairs = chunk_bytes // max(1, 4 * rows * max(heads, what.teacher.heads))  # of a query and a key, of one chunk
    chunk = max(FEWEST, pairs // max(1, length))
    before = length if what.window is None else what.window - 1
    if before < length:  # the most queries C that with their C + before keys make as many pairs
        chunk = max(chunk, int(((before**2 + 4 * pairs) ** 0.5 - before) / 2))
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        yield slice(start, stop), slice(max(0, start - before), stop)


@dataclass(eq=False)
class _Chunk:
    """Maps of some queries, [B, h, C, T], with all that the gradient needs of them."""

    what: Comparison
    taught_BHCT: Tensor  # as the teacher has them
    teacher_BhCT: Tensor
    student_BhCT: Tensor
    log_student_BhCT: Tensor
    slope_BhCT: Tensor | None  # of the soft cap, at the scores
    weight_BC: Tensor  # of each query: 1 / h where it counts

    @classmethod
    def of(cls, dots_BKXT: Tensor, what: Comparison, of: tuple[slice, slice], weights_hH: Tensor | None) -> _Chunk:
        """From dot products of queries and keys; these are overwritten."""
        part, reach = of
        seen_BCT = what.sees(part, reach)
        scores_BhCT = dots_BKXT.unflatten(2, (-1, part.stop - part.start)).flatten(1, 2).mul_(what.scaling)
        slope_BhCT = None
        if what.softcap is not None:
            bent_BhCT = scores_BhCT.div_(what.softcap).tanh_()
            slope_BhCT = 1 - bent_BhCT.square()
            scores_BhCT = bent_BhCT * what.softcap
        hidden_B1CT = ~seen_BCT[:, None]
        # Not infinite: a query that sees nothing would have no softmax. Its row is all the same taken for empty below.
        log_student_BhCT = scores_BhCT.masked_fill_(hidden_B1CT, torch.finfo(torch.float32).min).log_softmax(-1)
        student_BhCT = log_student_BhCT.exp().masked_fill_(hidden_B1CT, 0.0)
        log_student_BhCT.masked_fill_(hidden_B1CT, 0.0)
        taught_BHCT = what.teacher.probabilities(part, seen_BCT, first=reach.start)
        teacher_BhCT = taught_BHCT if weights_hH is None else mixed(weights_hH, taught_BHCT)
        weight_BC = what.mask_BS[:, part].float() / student_BhCT.shape[1]
        return cls(what, taught_BHCT, teacher_BhCT, student_BhCT, log_student_BhCT, slope_BhCT, weight_BC)

    def loss(self) -> Tensor:
        if self.what.distance == "mse":
            each_BhC = (self.teacher_BhCT - self.student_BhCT).square().sum(-1)
        else:
            each_BhC = torch.special.xlogy(self.teacher_BhCT, self.teacher_BhCT).sum(-1)
            each_BhC -= torch.linalg.vecdot(self.teacher_BhCT, self.log_student_BhCT)
        return (each_BhC.sum(1) * self.weight_BC).sum()

    def to_scores(self) -> Tensor:
        """The gradient at dot products, [B, h, C, T]."""
        if self.what.distance == "mse":
            apart_BhCT = self.student_BhCT - self.teacher_BhCT
            drawn_BhC1 = torch.linalg.vecdot(self.student_BhCT, apart_BhCT)[..., None]
            gradient_BhCT = apart_BhCT.sub_(drawn_BhC1).mul_(self.student_BhCT).mul_(2)
        else:
            gradient_BhCT = self.student_BhCT * self.teacher_BhCT.sum(-1, keepdim=True)
            gradient_BhCT.sub_(self.teacher_BhCT)
        if self.slope_BhCT is not None:
            gradient_BhCT.mul_(self.slope_BhCT)
        return gradient_BhCT.mul_((self.weight_BC * self.what.scaling)[:, None, :, None])

    def to_weights(self) -> Tensor:
        """The gradient at the weights that mix heads, [h, H]."""
        if self.what.distance == "mse":
            slope_BhCT = 2 * (self.teacher_BhCT - self.student_BhCT)
        else:
            slope_BhCT = self.teacher_BhCT.clamp_min(SMALLEST).log() + 1 - self.log_student_BhCT
        return torch.einsum("BhCT,BHCT,BC->hH", slope_BhCT, self.taught_BHCT, self.weight_BC)
