"""Attention against attention, map against map.

    attention-kl   KL(teacher ‖ student) over the keys of each query, mean over heads
    attention-mse  Σ over keys of the squared difference, mean over heads        (Jiao et al., "TinyBERT", 2020)

Maps are formed from queries and keys, or from the bytes of stored maps, a chunk of queries at a time, and once more in the
backward pass: what is held is queries and keys, linear in the length of a row, or those bytes. Both maps are over the keys
that both models see: where one of them has a window, that of the narrower one, and with sinks each is taken over its keys
alone.

Shapes: B rows, S tokens, C queries of a chunk, H heads of the teacher, h of the student, E a head's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from teachercache.objective.layers.heads import HeadMixture, mixed
from teachercache.objective.layers.term import LayerBatch
from teachercache.targets.attention import TaughtAttention, log_attention, sees

CHUNK_BYTES = 64 * 2**20  # of one map [B, H, C, S]


class AttentionTerm(torch.nn.Module):
    """Either loss."""

    of = "attention"

    def __init__(
        self, match: str, pairs: tuple[tuple[int, int], ...], *, heads: str, student_heads: int, teacher_heads: int
    ) -> None:
        super().__init__()
        self.match, self.pairs = match, pairs
        self.mixtures = torch.nn.ModuleList(
            HeadMixture(heads, teacher=teacher_heads, student=student_heads) for _ in pairs
        )

    def loss(self, batch: LayerBatch) -> Tensor:
        """The sum over positions, the mean over pairs."""
        total = batch.mask_BS.new_zeros((), dtype=torch.float32)
        for mixture, (student, teacher) in zip(self.mixtures, self.pairs, strict=True):
            total = total + self._pair(batch, mixture, batch.attention[student], batch.teacher_attention[teacher])
        return total / len(self.pairs)

    def idle(self, like: Tensor) -> Tensor:
        """Zero, by all weights: see `LayerTerm`."""
        return sum((mixture(like).sum() * 0.0 for mixture in self.mixtures), like.new_zeros(()))

    def _pair(self, batch: LayerBatch, mixture: Any, student: Any, teacher: TaughtAttention) -> Tensor:
        rows, length = batch.segment_BS.shape
        heads = max(teacher.heads, student.queries_BHSE.shape[1])
        chunk = max(1, CHUNK_BYTES // (4 * rows * heads * length))
        weights_hH = mixture(student.queries_BHSE)
        windows = [window for window in (student.window, teacher.window) if window is not None]
        window = min(windows) if windows else None
        total = weights_hH.sum() * 0.0
        for start in range(0, length, chunk):
            part = slice(start, min(start + chunk, length))
            mask_BC = batch.mask_BS[:, part]
            sees_BCS = sees(torch, batch.segment_BS, window=window, start=part.start, stop=part.stop)
            arguments = (student.queries_BHSE[:, :, part], student.keys_BKSE, teacher, part, sees_BCS, mask_BC)
            total = total + checkpoint(
                self._chunk, weights_hH, student, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        return total

    def _chunk(
        self,
        weights_hH: Tensor,
        student: Any,
        queries_BhCE: Tensor,
        keys_BkSE: Tensor,
        teacher: TaughtAttention,
        part: slice,
        sees_BCS: Tensor,
        mask_BC: Tensor,
    ) -> Tensor:
        teacher_BhCS = mixed(weights_hH, teacher.probabilities(part, sees_BCS))
        log_student_BhCS = log_attention(
            queries_BhCE, keys_BkSE, sees_BCS, scaling=student.scaling, softcap=student.softcap
        )
        if self.match == "attention-mse":
            apart_BhCS = teacher_BhCS - log_student_BhCS.exp().masked_fill(~sees_BCS[:, None], 0.0)
            loss_BC = apart_BhCS.square().sum(-1).mean(1)
        else:
            log_student_BhCS = log_student_BhCS.masked_fill(~sees_BCS[:, None], 0.0)
            gap_BhCS = teacher_BhCS.clamp_min(1e-30).log() - log_student_BhCS
            loss_BC = (teacher_BhCS * gap_BhCS).sum(-1).mean(1)
        return (loss_BC * mask_BC).sum()
