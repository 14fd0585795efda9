"""The loss across tokenizers together with the student's output projection, in chunks of positions: no [N, V] logits.

As `objective.logits.projected` does, gradients are formed in the forward pass, a block of logits at a time. Likelihoods of
chunks are made of several positions, which may lie in several blocks: where a term needs them, log-likelihoods are formed
first, the term's slope in each of them follows, and then the gradients, so that the output projection runs once more.

Shapes: N positions, C of them in a block, P chunks that begin in a block, M chunks, D width, V rows of the output matrix: the
student's vocabulary, and padding beyond it, which is a part of its softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teachercache.objective.cross_tokenizer.batch import Chunks
from teachercache.objective.cross_tokenizer.softmax import label_terms
from teachercache.objective.cross_tokenizer.term import ChunkTerm, PairTerm
from teachercache.objective.logits.projected import carry_on, chunk_logits, chunk_rows, summed
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.targets.logits.softened import Softened


@dataclass(frozen=True, eq=False)
class Batch:
    """Everything but the student's output. `teachers` has the teacher at every chunk's begin for each of `pair_terms`."""

    labels_N: Tensor
    chunks: Chunks
    pair_terms: Sequence[PairTerm]
    teachers: Sequence[Softened]
    chunk_terms: Sequence[ChunkTerm]
    begins_V: Tensor | None  # which of the student's tokens begin a new pre-token, where a term needs it
    alpha: float

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sums beside total and cross-entropy: terms, and what they measure."""
        return names_of(self.pair_terms, self.chunk_terms)


def names_of(pair_terms: Sequence[PairTerm], chunk_terms: Sequence[ChunkTerm]) -> tuple[str, ...]:
    """Returns the names of terms, and of what they measure, as logs have them."""
    measured = [name for term in pair_terms for name in (term.name, *term.measured)]
    return (*measured, *(term.name for term in chunk_terms))


@dataclass(frozen=True, eq=False)
class Sums:
    """Over positions, or chunks; nats. `total` carries the gradient."""

    total: Tensor
    ce: Tensor
    named: dict[str, Tensor]


def across_sums_of_output(output: StudentOutput, positions_N: Tensor, batch: Batch) -> Sums:
    """The sums of a batch, from its logits or through its output layer. `positions_N` are rising indices into [B · S]."""
    values_NA, layer = output.values_RA[positions_N], output.layer
    if layer is None:
        return across_sums_of_logits(values_NA, batch)
    return across_sums(values_NA, layer.weight_LD, layer.bias_L, batch, softcap=layer.softcap)


def across_sums(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    batch: Batch,
    *,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Sums:
    """total = alpha · Σ weight · term + (1 - alpha) · ce of the logits cap(hidden · weightᵀ + bias).

    Gradients flow from `total` alone, into hidden states, weight and bias. Under autocast the matmuls run in its type.
    """
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    with torch.autocast(device, enabled=False):
        operands = (hidden_ND.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype))
        layer = _Layer(softcap, chunk_rows(weight_VD, chunk_bytes))
        if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
            total, ce, *named = _Across.apply(*operands, batch, layer)
            return Sums(total, ce, dict(zip(batch.names, named, strict=True)))
        with torch.no_grad():
            return _concatenated([layer.block(operands, part, batch) for part in layer.parts(operands)], batch)


def across_sums_of_logits(logits_NV: Tensor, batch: Batch) -> Sums:
    """The same from the logits of all positions, for students whose output layer does more than project."""
    with torch.autocast(logits_NV.device.type, enabled=False):
        # Some models write -inf where there is no token, which the teacher gives 0, and 0 · inf is no number.
        finite_NV = _float(logits_NV).clamp_min(torch.finfo(torch.float32).min)
        block = _block(finite_NV, slice(0, len(logits_NV)), batch)
        return _concatenated([block], batch)


Operands = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class _Block:
    """Results of some positions, in order."""

    ce_C: Tensor
    boundary_C: Tensor | None  # log-mass on tokens that begin a new pre-token
    pairs: list[tuple[Tensor, dict[str, Tensor]]]  # of each pair term: losses, and what is measured, [P]

    def detached(self) -> _Block:
        boundary_C = None if self.boundary_C is None else self.boundary_C.detach()
        return _Block(self.ce_C.detach(), boundary_C, [(values.detach(), measured) for values, measured in self.pairs])


def _block(logits_CV: Tensor, part: slice, batch: Batch, *, pair_terms: bool = True) -> _Block:
    """Computes from logits what the terms need of the positions `part`."""
    labels_C = batch.labels_N[part]
    ce_C, boundary_C = label_terms(logits_CV, labels_C, batch.begins_V)
    if not pair_terms or not batch.pair_terms:
        return _Block(ce_C, boundary_C, [])
    first_M = batch.chunks.first_M
    begins, ends = torch.searchsorted(first_M, first_M.new_tensor([part.start, part.stop])).tolist()
    logits_PV = logits_CV[first_M[begins:ends] - part.start]
    teachers = [teacher.at(slice(begins, ends)) for teacher in batch.teachers]
    pairs = [term.values(logits_PV, teacher) for term, teacher in zip(batch.pair_terms, teachers, strict=True)]
    return _Block(ce_C, boundary_C, pairs)


def _concatenated(blocks: Sequence[_Block], batch: Batch) -> Sums:
    """Blocks that hold all positions, in order, to the sums; on their graph."""
    like = batch.chunks.log_prob_M
    ce_N = torch.cat([block.ce_C for block in blocks] or [like.new_zeros(0)])
    named: dict[str, Tensor] = {}
    total = (1 - batch.alpha) * ce_N.sum()
    for number, pair_term in enumerate(batch.pair_terms):
        results = [block.pairs[number] for block in blocks]
        value = sum((values.sum() for values, _ in results), ce_N.new_zeros(()))
        named[pair_term.name], total = value.detach(), total + batch.alpha * pair_term.weight * value
        for name in pair_term.measured:
            named[name] = sum((measured[name].sum() for _, measured in results), ce_N.new_zeros(()))
    boundaries = [block.boundary_C for block in blocks if block.boundary_C is not None]
    boundary_N = torch.cat(boundaries or [ce_N.new_zeros(0)]) if batch.begins_V is not None else None
    for chunk_term, value in zip(batch.chunk_terms, _of_chunks(ce_N, boundary_N, batch), strict=True):
        named[chunk_term.name], total = value.detach(), total + batch.alpha * chunk_term.weight * value
    return Sums(total, ce_N.sum().detach(), named)


def _of_chunks(ce_N: Tensor, boundary_N: Tensor | None, batch: Batch) -> list[Tensor]:
    """The sum of each chunk term, on the graph of the positions' log-likelihoods."""
    chunks, count = batch.chunks, len(batch.chunks)
    log_prob_M = ce_N.new_zeros(count + 1).index_add(0, chunks.of_N, -ce_N)[:count]
    boundary_M = None
    if boundary_N is not None:
        boundary_M = torch.cat([boundary_N, boundary_N.new_zeros(1)])[chunks.last_M]
    return [term.values(log_prob_M, boundary_M, chunks).sum() for term in batch.chunk_terms]


def _float(logits_CV: Tensor) -> Tensor:
    return logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()


@dataclass(frozen=True, eq=False)
class _Layer:
    """The output layer, but for its weights."""

    softcap: float | None
    rows: int  # positions of a block

    def parts(self, operands: Operands) -> Iterator[slice]:
        """Blocks of positions."""
        count = len(operands[0])
        return (slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows))

    def projected(self, operands: Operands, part: slice) -> Tensor:
        """Logits before the soft cap, [C, V]."""
        hidden_ND, weight_VD, bias_V = operands
        return chunk_logits(hidden_ND[part], weight_VD, bias_V, None)

    def capped(self, projected_CV: Tensor) -> Tensor:
        """Logits, [C, V], float32."""
        logits_CV = _float(projected_CV)
        return logits_CV if self.softcap is None else self.softcap * torch.tanh(logits_CV / self.softcap)

    def block(self, operands: Operands, part: slice, batch: Batch, *, pair_terms: bool = True) -> _Block:
        """Without a graph."""
        return _block(self.capped(self.projected(operands, part)), part, batch, pair_terms=pair_terms)


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, batch: Batch, layer: _Layer
    ) -> tuple[Tensor, ...]:
        operands = (hidden_ND, weight_VD, bias_V)
        wanted = ctx.needs_input_grad
        gradients = (
            torch.empty_like(hidden_ND) if wanted[0] else None,
            torch.zeros(weight_VD.shape, dtype=summed(weight_VD), device=weight_VD.device) if wanted[1] else None,
            torch.zeros(len(weight_VD), dtype=summed(weight_VD), device=weight_VD.device) if wanted[2] else None,
        )
        slopes = _chunk_slopes(operands, batch, layer)
        blocks = []
        for part in layer.parts(operands):
            block, gradient_CV = _with_gradient(operands, part, batch, layer, slopes)
            carry_on(gradient_CV, hidden_ND[part], weight_VD, part, gradients)
            blocks.append(block)
        ctx.gradients, ctx.dtype = gradients, weight_VD.dtype
        sums = _concatenated(blocks, batch)
        values = (sums.total, sums.ce, *(sums.named[name] for name in batch.names))
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss across tokenizers keeps its gradients once: call backward once per forward")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if gradient is None else gradient.mul_(grad_total).to(ctx.dtype) for gradient in gradients]
        return (*scaled, None, None)


def _chunk_slopes(operands: Operands, batch: Batch, layer: _Layer) -> tuple[Tensor, Tensor | None] | None:
    """Returns the derivatives of the chunk terms by each position's cross-entropy and boundary mass, [N]; None without
    such terms."""
    if not batch.chunk_terms:
        return None
    blocks = [layer.block(operands, part, batch, pair_terms=False) for part in layer.parts(operands)]
    if not blocks:
        return None
    ce_N = torch.cat([block.ce_C for block in blocks]).requires_grad_()
    boundaries = [block.boundary_C for block in blocks if block.boundary_C is not None]
    boundary_N = torch.cat(boundaries).requires_grad_() if boundaries else None
    with torch.enable_grad():
        values = _of_chunks(ce_N, boundary_N, batch)
        weighted = torch.stack(
            [batch.alpha * term.weight * value for term, value in zip(batch.chunk_terms, values, strict=True)]
        ).sum()
    inputs = [ce_N] if boundary_N is None else [ce_N, boundary_N]
    slope_ce_N, *others = torch.autograd.grad(weighted, inputs, allow_unused=True, materialize_grads=True)
    return slope_ce_N, others[0] if others else None


def _with_gradient(
    operands: Operands, part: slice, batch: Batch, layer: _Layer, slopes: tuple[Tensor, Tensor | None] | None
) -> tuple[_Block, Tensor]:
    """A block, and the gradient of its logits before the soft cap, [C, V]."""
    projected_CV = layer.projected(operands, part).requires_grad_()
    with torch.enable_grad():
        block = _block(layer.capped(projected_CV), part, batch)
        loss = (1 - batch.alpha) * block.ce_C.sum()
        for term, (values_P, _) in zip(batch.pair_terms, block.pairs, strict=True):
            loss = loss + batch.alpha * term.weight * values_P.sum()
        if slopes is not None:
            slope_ce_N, slope_boundary_N = slopes
            loss = loss + (slope_ce_N[part] * block.ce_C).sum()
            if block.boundary_C is not None and slope_boundary_N is not None:
                loss = loss + (slope_boundary_N[part] * block.boundary_C).sum()
    (gradient_CV,) = torch.autograd.grad(loss, projected_CV)
    return block.detached(), gradient_CV
