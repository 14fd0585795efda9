"""Several teachers' distributions as one, formed a block of positions at a time: no [N, V] tensor of a whole batch.

    arithmetic    log Σ_i w_i p_i(v)    a mixture: what any teacher finds likely stays likely
    geometric     Σ_i w_i log p_i(v)    a product of experts: what one teacher rules out is ruled out

p_i is what teacher i says at the current temperature, however it is stored: heads differ in size and kind, and each fills
in its own tail. Mixtures of teachers: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, where
the geometric mean is named as well; products: Hinton, "Products of Experts", 1999.

**Another vocabulary.** A teacher with another tokenizer can emit only some of the student's tokens in one step, the set E.
About the others it says nothing, which is not the same as giving them no mass: held against zeros there a student would
lose the long tokens that its vocabulary is made of. So its distribution is completed by `base`, that of the teachers which
speak the student's tokens: inside E what it says, scaled to the mass that they give to E, and outside what they say,

    p̂(v) = base(E) · p(v) / p(E)  for v in E,    p̂(v) = base(v)  outside.

Of all distributions that agree with the teacher inside E it is the nearest to `base` in KL(base ‖ ·): by the chain rule
that is a KL of E's mass, one outside of E, both of which can be 0, and one inside, which is given. Jeffrey, "The Logic of
Decision", 1965, calls it probability kinematics.

What a step costs with two teachers beside one, tests/bench/fusion_cost.py measures.

Shapes: N positions of a batch, C of a block, c of these at which a teacher speaks, V student's tokens, U a teacher's own, K
teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from teachercache.objective.ensemble.teacher_view import FLOOR, TeacherBlock, TeacherView
from teachercache.objective.logits.blocks import block_rows
from teachercache.objective.logits.tail_logits import write_logits
from teachercache.targets.logits.softened import UniformTail

Fusion = Literal["arithmetic", "geometric"]


@dataclass(frozen=True, eq=False)
class FusedTail:
    """See `targets.logits.softened.Tail`. The first teacher speaks the student's tokens, at every position.

    `weight_NK` are each position's weights: they sum to 1, and are 0 where a teacher is silent. A position whose weights are
    all 0 gets numbers without a meaning.
    """

    teacher_views: Sequence[TeacherView]
    weight_NK: Tensor
    fusion: Fusion
    vocabulary_size: int

    def logits(self, part: slice, xp: Any) -> Any:
        """Log-probabilities of all V tokens at some of the positions, up to a constant of each, [C, V]."""
        start, stop, _ = part.indices(len(self.weight_NK))
        logits_CV = self.weight_NK.new_empty(stop - start, self.vocabulary_size)
        self.expander()(slice(start, stop), logits_CV)
        return logits_CV

    def at(self, part: slice) -> FusedTail:
        """The tail of some of the positions."""
        start, stop, _ = part.indices(len(self.weight_NK))
        teacher_views = [teacher_view.at(start, stop) for teacher_view in self.teacher_views]
        return replace(self, teacher_views=teacher_views, weight_NK=self.weight_NK[start:stop])

    def expander(self) -> Callable[[slice, Tensor], None]:
        """Returns a function that writes logits into a buffer, with scratch that it keeps from one call to the next."""
        return _Expander(self)


class _Expander:
    """Sketches are multiplied out for many positions at once, as one teacher's are (tail_logits.py); the passes over what
    comes of it run over few, which stay in a processor's cache."""

    def __init__(self, tail: FusedTail) -> None:
        self._tail = tail
        self._scratch: dict[str, Tensor] = {}

    def __call__(self, part: slice, logits_CV: Tensor) -> None:
        tail = self._tail
        expanded = [self._expanded(number, part, logits_CV) for number in range(len(tail.teacher_views))]
        rows = block_rows(tail.vocabulary_size, logits_CV.dtype, logits_CV.device)
        fuse = self._mixture if tail.fusion == "arithmetic" else self._product
        for start in range(part.start, part.stop, rows):
            stop = min(start + rows, part.stop)
            blocks = []
            for number, (teacher_view, logits_nU) in enumerate(zip(tail.teacher_views, expanded, strict=True)):
                own_rows, skipped = teacher_view.own(start, stop), int(teacher_view.before[part.start])
                logits_cU = None if logits_nU is None else logits_nU[own_rows.start - skipped : own_rows.stop - skipped]
                blocks.append(teacher_view.teacher_block(start, stop, logits_cU, tail.weight_NK[:, number]))
            native = [block for block in blocks if len(block) and block.projection is None]
            others = [block for block in blocks if len(block) and block.projection is not None]
            fuse(native, others, logits_CV[start - part.start : stop - part.start])

    def _expanded(self, number: int, part: slice, like: Tensor) -> Tensor | None:
        """The logits of a teacher's tail where it speaks in a chunk, [n, U]; None for one that has none."""
        teacher_view = self._tail.teacher_views[number]
        rows, tail = teacher_view.own(part.start, part.stop), teacher_view.softened.tail
        if tail is None or isinstance(tail, UniformTail):
            return None
        logits_nU = self._buffer(f"tail {number}", like, rows.stop - rows.start, teacher_view.tokens(like.shape[1]))
        write_logits(tail, rows, logits_nU)
        return logits_nU

    def _mixture(self, native: Sequence[TeacherBlock], others: Sequence[TeacherBlock], out_CV: Tensor) -> None:
        self._sum(native, out_CV, TeacherBlock.add)
        if others:
            base_CV = self._buffer("base", out_CV, *out_CV.shape)
            torch.div(out_CV, _weights(native, len(out_CV)), out=base_CV)
            for block in others:
                completed_cV = self._completed(block, base_CV)
                _add_rows(out_CV, block.rows, completed_cV.mul_(block.weight_c1))
        out_CV.clamp_min_(torch.finfo(out_CV.dtype).tiny).log_()

    def _product(self, native: Sequence[TeacherBlock], others: Sequence[TeacherBlock], out_CV: Tensor) -> None:
        self._sum(native, out_CV, TeacherBlock.add_log)
        if others:
            base_CV = self._buffer("base", out_CV, *out_CV.shape)
            torch.softmax(out_CV / _weights(native, len(out_CV)), -1, out=base_CV)
            for block in others:
                log_cV = self._completed(block, base_CV).log_().clamp_min_(FLOOR)
                _add_rows(out_CV, block.rows, log_cV.mul_(block.weight_c1))

    def _sum(
        self,
        native: Sequence[TeacherBlock],
        out_CV: Tensor,
        add: Callable[[TeacherBlock, Tensor, Tensor, Tensor], None],
    ) -> None:
        """Sums over the teachers that speak the student's tokens."""
        out_CV.zero_()
        share_CV = self._buffer("share", out_CV, *out_CV.shape)
        for block in native:
            if block.rows is None:
                add(block, out_CV, block.weight_c1, share_CV)
            else:
                sum_cV = out_CV[block.rows]
                add(block, sum_cV, block.weight_c1, share_CV[: len(sum_cV)])
                out_CV[block.rows] = sum_cV

    def _completed(self, teacher_block: TeacherBlock, base_CV: Tensor) -> Tensor:
        """p̂ of a teacher in another vocabulary, [c, V]."""
        assert teacher_block.projection is not None
        shape = len(teacher_block), len(teacher_block.projection.first_U)
        own_cU = self._buffer(f"own {shape[1]}", base_CV, *shape).zero_()
        share_cU = self._buffer(f"own share {shape[1]}", base_CV, *shape)
        teacher_block.add(own_cU, torch.ones_like(teacher_block.weight_c1), share_cU)
        projected_cV = teacher_block.projection(own_cU)
        base_cV = base_CV if teacher_block.rows is None else base_CV[teacher_block.rows]
        emitted_V = teacher_block.projection.emitted_V.to(base_cV.dtype)
        tiny = torch.finfo(base_cV.dtype).tiny
        scale_c1 = (base_cV @ emitted_V)[:, None] / projected_cV.sum(-1, keepdim=True).clamp_min(tiny)
        return projected_cV.mul_(scale_c1).addcmul_(base_cV, 1 - emitted_V)

    def _buffer(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Scratch [rows, tokens]; of one name tokens are always as many."""
        kept = self._scratch.get(name)
        if kept is None or len(kept) < shape[0]:
            kept = self._scratch[name] = like.new_empty(shape)
        return kept[: shape[0]]


def _weights(native: Sequence[TeacherBlock], positions: int) -> Tensor:
    """Adds up the weights of some teachers at each position, [C, 1]; more than 0."""
    weight_C1 = native[0].weight_c1.clone()
    for block in native[1:]:
        _add_rows(weight_C1, block.rows, block.weight_c1)
    return weight_C1.clamp_min_(torch.finfo(weight_C1.dtype).tiny)


def _add_rows(sum_CA: Tensor, rows: Tensor | None, values_cA: Tensor) -> None:
    if rows is None:
        sum_CA.add_(values_cA)
    else:
        sum_CA.index_add_(0, rows, values_cA)
