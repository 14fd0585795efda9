"""Output of a student for each token of a batch: its logits, or what enters its output layer together with that layer.

The second spares memory: losses project a chunk of positions at a time, and no logits of a whole batch exist.

Shapes: B rows, S tokens, R = B · S, N positions, C of them in a block, D width, L columns of the logits, A either of
these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teachercache.objective.logits.divergences import Divergence, forward_kl
from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.projected import chunk_logits, chunk_rows, projected_sums
from teachercache.targets.logits.softened import Softened
from teachercache.tasks.contract import NO_TARGET


@dataclass(frozen=True, eq=False)
class StudentOutputLayer:
    """The output layer of a student: logits are cap(hidden · weightᵀ + bias)."""

    weight_LD: Tensor
    bias_L: Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """[C, L]."""
        return chunk_logits(hidden_CD, self.weight_LD, self.bias_L, self.softcap)


@dataclass(frozen=True, eq=False)
class StudentOutput:
    """Hidden states and the output layer that they enter, or, without a layer, logits."""

    values_BSA: Tensor
    layer: StudentOutputLayer | None = None

    @classmethod
    def of_logits(cls, logits_BSL: Tensor) -> StudentOutput:
        """The output of a student whose logits exist."""
        return cls(logits_BSL)

    @classmethod
    def of_hidden(
        cls, hidden_BSD: Tensor, weight_LD: Tensor, bias_L: Tensor | None = None, softcap: float | None = None
    ) -> StudentOutput:
        """The output of a student whose logits are not formed."""
        return cls(hidden_BSD, StudentOutputLayer(weight_LD, bias_L, softcap))

    @property
    def columns(self) -> int:
        """Number of logits of a token, L."""
        return self.values_BSA.shape[-1] if self.layer is None else len(self.layer.weight_LD)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the logits."""
        return self.values_BSA.dtype if self.layer is None else self.layer.weight_LD.dtype

    @property
    def values_RA(self) -> Tensor:
        """The values of all tokens in one row, [B · S, A]."""
        return self.values_BSA.reshape(-1, self.values_BSA.shape[-1])

    def detached(self) -> StudentOutput:
        """The same numbers, of which only the values ask for a gradient: a new leaf."""
        layer, values_BSA = self.layer, self.values_BSA.detach().requires_grad_()
        if layer is not None:
            bias_L = None if layer.bias_L is None else layer.bias_L.detach()
            layer = replace(layer, weight_LD=layer.weight_LD.detach(), bias_L=bias_L)
        return StudentOutput(values_BSA, layer)

    def blocks(self, labels_BS: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which of the N positions, logits, their labels): a block of positions at a time, [1, C, L] and [1, C]; logits that
        exist come as they are, whole and with the labels of all tokens."""
        if self.layer is None:
            yield slice(None), self.values_BSA, labels_BS
            return
        is_position_BS, rows = labels_BS != NO_TARGET, chunk_rows(self.layer.weight_LD)
        hidden_ND, labels_N = self.values_BSA[is_position_BS], labels_BS[is_position_BS]
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            yield part, self.layer.logits(hidden_ND[part])[None], labels_N[None, part]


def output_sums(
    output: StudentOutput,
    *,
    positions_N: Tensor,
    labels_N: Tensor,
    teacher: Softened,
    weights: Weights,
    vocabulary_size: int,
    divergence: Divergence = forward_kl,
    position_weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, divergence, ce), sums over positions in nats: `distillation_sums` or `projected_sums`, whichever the output
    asks for. `positions_N` are rising indices into [B · S]."""
    if output.layer is None:
        return distillation_sums(
            output.values_BSA, positions_N=positions_N, labels_N=labels_N, teacher=teacher, weights=weights,
            vocabulary_size=vocabulary_size, divergence=divergence, position_weight_N=position_weight_N,
        )  # fmt: skip
    layer = output.layer
    return projected_sums(
        output.values_RA[positions_N], layer.weight_LD, layer.bias_L, labels_N=labels_N, teacher=teacher,
        weights=weights, vocabulary_size=vocabulary_size, softcap=layer.softcap, divergence=divergence,
        position_weight_N=position_weight_N,
    )  # fmt: skip
