"""Attention against attention, map against map.

    attention-kl   KL(teacher ‖ student) over the keys of each query, mean over heads
    attention-mse  Σ over keys of the squared difference, mean over heads        (Jiao et al., "TinyBERT", 2020)

Maps are formed from queries and keys, or from the bytes of stored maps, and never held: see `map_loss`. Both are over the
keys that both models see: where one of them has a window, that of the narrower one, and with sinks each is taken over its
keys alone. Without the first key both are taken over the others: language models park most of a query's attention on a
segment's first token (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024), and a loss over all
keys sees little else. How the rest is shared then counts as much at a query that gives the first token all but 1 % as at any.

Shapes: B rows, S tokens, C queries of a chunk, T keys of it, H heads of the teacher, h of the student.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teachercache.config import LayerTermConfig
from teachercache.objective.layers.heads import HeadMixture
from teachercache.objective.layers.map_loss import Comparison, Distance, map_loss
from teachercache.objective.layers.term import LayerBatch, StudentShape
from teachercache.targets import StoredTargets
from teachercache.targets.layers.attention import TaughtAttention, sees

if TYPE_CHECKING:
    from teachercache.models.activations import Heads

DISTANCES: dict[str, Distance] = {"attention-kl": "kl", "attention-mse": "mse"}


class AttentionTerm(torch.nn.Module):
    """Either loss."""

    of = "attention"
    measures_similarity = False
    least_segments = 1

    def __init__(
        self,
        match: str,
        pairs: tuple[tuple[int, int], ...],
        *,
        heads: str,
        student_heads: int,
        teacher_heads: int,
        first_key: bool = True,
    ) -> None:
        super().__init__()
        self.match, self.pairs, self._first_key = match, pairs, first_key
        self.mixtures = torch.nn.ModuleList(
            HeadMixture(heads, teacher=teacher_heads, student=student_heads) for _ in pairs
        )

    @classmethod
    def fitted(
        cls,
        config: LayerTermConfig,
        pairs: tuple[tuple[int, int], ...],
        *,
        targets: StoredTargets,
        student: StudentShape,
    ) -> AttentionTerm:
        """See `LayerTerm`."""
        assert targets.attention is not None
        counts = {"student_heads": student.heads, "teacher_heads": targets.attention.heads}
        return cls(config.match, pairs, heads=config.heads, first_key=config.first_key, **counts)

    def loss(self, batch: LayerBatch) -> Tensor:
        """The sum over positions, the mean over pairs."""
        total = batch.mask_BS.new_zeros((), dtype=torch.float32)
        for mixture, (student, teacher) in zip(self.mixtures, self.pairs, strict=True):
            total = total + self._pair(batch, mixture, batch.attention[student], batch.teacher_attention[teacher])
        return total / len(self.pairs)

    def zero_contribution(self, like: Tensor) -> Tensor:
        """Zero, by all weights: see `LayerTerm`."""
        return sum((mixture(like).sum() * 0.0 for mixture in self.mixtures), like.new_zeros(()))

    def _pair(self, batch: LayerBatch, mixture: torch.nn.Module, student: Heads, teacher: TaughtAttention) -> Tensor:
        weights_hH = mixture(student.queries_BHSE)
        windows = [window for window in (student.window, teacher.window) if window is not None]
        window = min(windows) if windows else None
        others_BS = None if self._first_key else ~batch.first_BS

        def seen(queries: slice, keys: slice) -> Tensor:
            sees_BCT: Tensor = sees(torch, batch.segment_BS, window=window, queries=queries, keys=keys)
            return sees_BCT if others_BS is None else sees_BCT & others_BS[:, None, keys]

        what = Comparison(
            DISTANCES[self.match],
            teacher,
            seen,
            batch.mask_BS,
            scaling=student.scaling,
            softcap=student.softcap,
            window=window,
        )
        mixing = None if mixture.is_identity else weights_hH
        return map_loss(student.queries_BHSE, student.keys_BKSE, mixing, what)
