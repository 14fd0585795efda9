"""Relations among a block's queries, keys or values: their own scaled dot products, whatever the head counts.

    query-relations, key-relations, value-relations    KL(teacher ‖ student) of softmax(X·Xᵀ / √d), mean over relation heads

X holds the vectors of all heads of a token, cut anew into as many *relation heads* as are asked for, so that teacher and
student need not have the same heads, nor the same width (Wang et al., "MiniLMv2", 2021). Relations are causal where the
model is: a token relates to those of its segment, up to itself.

Shapes: B rows, S tokens, C of them with T keys, H heads, E a head's width, r relation heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teachercache.config import LayerTermConfig
from teachercache.errors import CacheError
from teachercache.objective.layers.map_loss import Comparison, map_loss
from teachercache.objective.layers.term import LayerBatch, StudentShape
from teachercache.targets import StoredTargets
from teachercache.targets.layers.attention import HeadShape, sees
from teachercache.targets.layers.attention_factors import StoredHeads
from teachercache.targets.layers.kind import AttentionKind

PARTS = {"query-relations": "queries_BHSE", "key-relations": "keys_BKSE", "value-relations": "values_BKSE"}


class RelationTerm(torch.nn.Module):
    """Relations of one kind of vector."""

    of = "attention"
    measures_similarity = False
    least_segments = 1

    def __init__(self, match: str, pairs: tuple[tuple[int, int], ...], *, relation_heads: int) -> None:
        super().__init__()
        self.match, self.pairs, self._heads = match, pairs, relation_heads

    @classmethod
    def fitted(
        cls,
        config: LayerTermConfig,
        pairs: tuple[tuple[int, int], ...],
        *,
        targets: StoredTargets,
        student: StudentShape,
    ) -> RelationTerm:
        """See `LayerTerm`."""
        assert targets.attention is not None
        _check_vectors(config.match, targets.attention)
        heads = config.relation_heads or _heads_of(config.match, student)
        widths = {"student": student.head_width, "teacher": targets.attention.head_width}
        counts = {"student": _heads_of(config.match, student), "teacher": _heads_of(config.match, targets.attention)}
        check_relation_heads(heads, **{whose: count * widths[whose] for whose, count in counts.items()})
        return cls(config.match, pairs, relation_heads=heads)

    def loss(self, batch: LayerBatch) -> Tensor:
        """The sum over positions, the mean over pairs."""
        total = batch.mask_BS.new_zeros((), dtype=torch.float32)
        for student, teacher in self.pairs:
            sides = (batch.attention[student], batch.teacher_attention[teacher])
            student_BrSE, teacher_BrSE = (self._cut(getattr(side, PARTS[self.match])) for side in sides)
            total = total + self._pair(batch, student_BrSE, teacher_BrSE)
        return total / len(self.pairs)

    def zero_contribution(self, like: Tensor) -> Tensor:
        """Zero: it has no weights."""
        return like.new_zeros(())

    def _cut(self, vectors_BHSE: Tensor) -> Tensor:
        cut_BSrE: Tensor = vectors_BHSE.transpose(1, 2).flatten(2).unflatten(-1, (self._heads, -1))
        return cut_BSrE.transpose(1, 2)

    def _pair(self, batch: LayerBatch, student_BrSE: Tensor, teacher_BrSE: Tensor) -> Tensor:
        def seen(queries: slice, keys: slice) -> Tensor:
            sees_BCT: Tensor = sees(torch, batch.segment_BS, window=None, queries=queries, keys=keys)
            return sees_BCT

        student_width, teacher_width = student_BrSE.shape[-1], teacher_BrSE.shape[-1]
        shape = HeadShape(self._heads, self._heads, teacher_width, scaling=teacher_width**-0.5)
        taught = StoredHeads(teacher_BrSE, teacher_BrSE, None, shape, None)
        what = Comparison("kl", taught, seen, batch.mask_BS, scaling=student_width**-0.5)
        return map_loss(student_BrSE, student_BrSE, None, what)


def _heads_of(match: str, shape: StudentShape | AttentionKind) -> int:
    """Counts the heads whose vectors a loss relates."""
    return shape.heads if match == "query-relations" else shape.key_heads


def _check_vectors(match: str, kind: AttentionKind) -> None:
    if not kind.keeps_vectors:
        raise CacheError(
            f"objective.layers match {match}, but the cache keeps attention maps, not the vectors that relations are "
            "among; precompute it with targets.attention.kind: relations, or match attention-kl"
        )
    if match == "value-relations" and not kind.values:
        raise CacheError(
            "objective.layers match value-relations, but the cache keeps no values; precompute it with "
            "targets.attention.values: true"
        )


def check_relation_heads(heads: int, **widths: int) -> None:
    """Raise `CacheError` where the vectors of a token cannot be cut into so many relation heads."""
    for whose, width in widths.items():
        if width % heads:
            raise CacheError(
                f"objective.layers: relation_heads is {heads}, which does not divide the {width} channels of the {whose}; "
                "choose a divisor of both widths"
            )
