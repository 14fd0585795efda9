"""The loss together with the student's output projection, in chunks of positions: no [B, S, V] logits at all.

A chunk is projected, its loss and the gradient of its logits are formed at once, and that gradient is carried on to the
chunk's hidden states and to the output matrix: what stays is [N, D] and [V, D], and peak memory is a chunk times V.
Nothing is computed twice. Padding and tokens without a target are never projected.

Forming gradients in the forward pass: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024.

Shapes: N positions, C of them in a chunk, D width, L rows of the output matrix, the first V of which are the vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from teachercache.objective.logits.divergences import Divergence, forward_kl
from teachercache.objective.logits.fused import run, totals
from teachercache.objective.logits.operands import Batch, Weights
from teachercache.targets.logits.softened import Softened

# Of float32 logits. Larger ones read the output matrix less often.
CPU_CHUNK_BYTES = 96 * 2**20
DEVICE_CHUNK_BYTES = 512 * 2**20


def projected_sums(
    hidden_ND: Tensor,
    weight_LD: Tensor,
    bias_L: Tensor | None,
    *,
    labels_N: Tensor,
    teacher: Softened,
    weights: Weights,
    vocabulary_size: int,
    softcap: float | None = None,
    divergence: Divergence = forward_kl,
    position_weight_N: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `distillation_sums` of the logits cap(hidden · weightᵀ + bias): (total, divergence, ce), sums over positions.

    Gradients flow from `total` alone, into hidden states, weight and bias. Under autocast the matmuls run in its type.
    """
    device = hidden_ND.device.type
    dtype = autocast_type(device, weight_LD.dtype)
    positions_N = torch.arange(len(hidden_ND), device=hidden_ND.device)
    batch = Batch(
        positions_N, labels_N, teacher, divergence, weights, position_weight_N, vocabulary_size, consecutive=True
    )
    chunk = chunk_rows(weight_LD, chunk_bytes)
    with torch.autocast(device, enabled=False):
        operands = (hidden_ND.to(dtype), weight_LD.to(dtype), None if bias_L is None else bias_L.to(dtype))
        if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
            sums: tuple[Tensor, Tensor, Tensor] = _Projected.apply(*operands, batch, softcap, chunk)
            return sums
        return totals(*_run_chunks(operands, batch, softcap, chunk, gradients=None), batch)


def autocast_type(device: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the type of matmuls: autocast's, where that is on, else the weights' own."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def chunk_rows(weight_LD: Tensor, chunk_bytes: int | None = None) -> int:
    """Positions of a chunk whose float32 logits take `chunk_bytes`, by default what suits the device."""
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if weight_LD.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(1, chunk_bytes // (4 * len(weight_LD)))


def chunk_logits(hidden_CD: Tensor, weight_LD: Tensor, bias_L: Tensor | None, softcap: float | None) -> Tensor:
    """cap(hidden · weightᵀ + bias), [C, L]."""
    logits_CL = torch.nn.functional.linear(hidden_CD, weight_LD, bias_L)
    return logits_CL if softcap is None else logits_CL.div_(softcap).tanh_().mul_(softcap)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_LD: Tensor,
        bias_L: Tensor | None,
        batch: Batch,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad
        gradients = (
            torch.empty_like(hidden_ND) if wanted[0] else None,
            # Chunks add up: in float32, whatever the weights are.
            torch.zeros(weight_LD.shape, dtype=summed(weight_LD), device=weight_LD.device) if wanted[1] else None,
            torch.zeros(len(weight_LD), dtype=summed(weight_LD), device=weight_LD.device) if wanted[2] else None,
        )
        parts = _run_chunks((hidden_ND, weight_LD, bias_L), batch, softcap, chunk, gradients=gradients)
        ctx.gradients, ctx.dtype = gradients, weight_LD.dtype
        total, divergence, ce = totals(*parts, batch)
        ctx.mark_non_differentiable(divergence, ce)
        return total, divergence, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the distillation loss keeps its gradients once: call backward once per forward")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if gradient is None else gradient.mul_(grad_total).to(ctx.dtype) for gradient in gradients]
        return (*scaled, None, None, None)


def summed(weight_LD: Tensor) -> torch.dtype:
    """The type that chunks' gradients add up in."""
    return torch.float64 if weight_LD.dtype == torch.float64 else torch.float32


def _run_chunks(
    operands: tuple[Tensor, Tensor, Tensor | None],
    batch: Batch,
    softcap: float | None,
    chunk: int,
    *,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
) -> tuple[Tensor, Tensor]:
    """Divergence and CE by position, [N] each; fills the gradients."""
    hidden_ND, weight_LD, bias_L = operands
    divergences, ces = [], []
    for start in range(0, len(hidden_ND), chunk):
        part = slice(start, start + chunk)
        hidden_CD = hidden_ND[part]
        logits_CL = chunk_logits(hidden_CD, weight_LD, bias_L, softcap)
        gradient_CL = None if gradients is None else torch.empty_like(logits_CL)
        divergence_C, ce_C = run(logits_CL, gradient_CL, _chunk_of(batch, part, len(hidden_CD)), None)
        divergences.append(divergence_C)
        ces.append(ce_C)
        if gradients is None or gradient_CL is None:
            continue
        if softcap is not None:  # d cap(u) / du = 1 - (cap(u) / softcap)²
            gradient_CL.mul_(logits_CL.div_(softcap).square_().neg_().add_(1))
        carry_on(gradient_CL, hidden_CD, weight_LD, part, gradients)
    nothing = hidden_ND.new_zeros(0, dtype=summed(weight_LD))
    return torch.cat(divergences or [nothing]), torch.cat(ces or [nothing])


def _chunk_of(batch: Batch, part: slice, positions: int) -> Batch:
    weight_N = batch.position_weight_N
    return replace(
        batch,
        positions_N=batch.positions_N[:positions],
        labels_N=batch.labels_N[part],
        teacher=batch.teacher.at(part),
        position_weight_N=None if weight_N is None else weight_N[part],
    )


def carry_on(
    gradient_CL: Tensor,
    hidden_CD: Tensor,
    weight_LD: Tensor,
    part: slice,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """From a chunk's logits to its hidden states, and added up, to weight and bias."""
    of_hidden_ND, of_weight_LD, of_bias_L = gradients
    if of_hidden_ND is not None:
        torch.mm(gradient_CL, weight_LD, out=of_hidden_ND[part])
    if of_weight_LD is not None:
        if of_weight_LD.dtype == gradient_CL.dtype:
            of_weight_LD.addmm_(gradient_CL.T, hidden_CD)
        else:
            of_weight_LD.add_(gradient_CL.T @ hidden_CD)
    if of_bias_L is not None:
        of_bias_L.add_(gradient_CL.sum(0))
