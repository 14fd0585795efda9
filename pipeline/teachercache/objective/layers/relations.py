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

from teachercache.errors import CacheError
from teachercache.objective.layers.map_loss import Comparison, map_loss
from teachercache.objective.layers.term import LayerBatch
from teachercache.targets.layers.attention import HeadShape, sees
from teachercache.targets.layers.attention_relations import StoredHeads

PARTS = {"query-relations": "queries_BHSE", "key-relations": "keys_BKSE", "value-relations": "values_BKSE"}


class RelationTerm(torch.nn.Module):
    """Relations of one kind of vector."""

    of = "attention"

    def __init__(self, match: str, pairs: tuple[tuple[int, int], ...], *, relation_heads: int) -> None:
        super().__init__()
        self.match, self.pairs, self._heads = match, pairs, relation_heads

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
        return vectors_BHSE.transpose(1, 2).flatten(2).unflatten(-1, (self._heads, -1)).transpose(1, 2)

    def _pair(self, batch: LayerBatch, student_BrSE: Tensor, teacher_BrSE: Tensor) -> Tensor:
        def seen(queries: slice, keys: slice) -> Tensor:
            sees_BCT: Tensor = sees(torch, batch.segment_BS, window=None, queries=queries, keys=keys)
            return sees_BCT

        student_width, teacher_width = student_BrSE.shape[-1], teacher_BrSE.shape[-1]
        shape = HeadShape(self._heads, self._heads, teacher_width, scaling=teacher_width**-0.5)
        taught = StoredHeads(teacher_BrSE, teacher_BrSE, None, shape, None)
        what = Comparison("kl", taught, seen, batch.mask_BS, scaling=student_width**-0.5)
        return map_loss(student_BrSE, student_BrSE, None, what)


def check_relation_heads(heads: int, **widths: int) -> None:
    """Raise `CacheError` where the vectors of a token cannot be cut into so many relation heads."""
    for whose, width in widths.items():
        if width % heads:
            raise CacheError(
                f"objective.layers: relation_heads is {heads}, which does not divide the {width} channels of the {whose}; "
                "choose a divisor of both widths"
            )
