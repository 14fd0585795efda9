"""View of one of several teachers on a batch: at some of its positions, perhaps in another vocabulary.

Shapes: N positions of a batch, n of them at which a teacher speaks; C positions of a block, c of them with a teacher; U tokens
of the teacher's own vocabulary, V of the student's; k tokens of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.objective.cross_tokenizer.projected_kl import VocabularyProjection
from teachercache.targets.logits.softened import Softened, UniformTail

# Log-probability that stands for none: what float32 takes for zero. A weighted mean of logarithms needs a number.
FLOOR = -103.0
NOTHING = -1e30  # of a tail's logits: no share of it


@dataclass(frozen=True, eq=False)
class TeacherView:
    """One teacher at n of the N positions, in their order.

    A tail of None means that the head is all there is: renormalised, or of all tokens.
    """

    softened: Softened
    at_n: Tensor  # which of the N positions
    before: NDArray[np.int64]  # how many of them come before each position, [N + 1], on the host
    projection: VocabularyProjection | None = None  # None: it speaks the student's tokens

    @classmethod
    def of(
        cls, softened: Softened, at_n: Tensor | None, *, positions: int, projection: VocabularyProjection | None = None
    ) -> TeacherView:
        """`at_n` rises; None: at all positions. It is read on the host, once a batch."""
        if at_n is None:
            everywhere_n = torch.arange(positions, device=softened.tail_log_prob_N.device)
            return cls(softened, everywhere_n, np.arange(positions + 1), projection)
        speaks_N = np.bincount(at_n.cpu().numpy(), minlength=positions)
        return cls(softened, at_n, np.concatenate([[0], np.cumsum(speaks_N)]), projection)

    def at(self, start: int, stop: int) -> TeacherView:
        """At positions `start` … `stop - 1` alone, counted from there."""
        places, before = self.own(start, stop), self.before[start : stop + 1] - self.before[start]
        return replace(self, softened=self.softened.at(places), at_n=self.at_n[places] - start, before=before)

    def own(self, start: int, stop: int) -> slice:
        """Returns those of its n positions that lie in a block."""
        return slice(int(self.before[start]), int(self.before[stop]))

    def rows(self, start: int, stop: int) -> Tensor | None:
        """At which positions of a block it speaks; None: at all."""
        places = self.own(start, stop)
        return None if places.stop - places.start == stop - start else self.at_n[places] - start

    def tokens(self, vocabulary_size: int) -> int:
        """U; `vocabulary_size` is the student's."""
        return vocabulary_size if self.projection is None else len(self.projection.first_U)

    def teacher_block(self, start: int, stop: int, logits_cU: Tensor | None, weight_N: Tensor) -> TeacherBlock:
        """In the block `start` … `stop - 1`, with the logits of its tail there."""
        places, rows, softened, dtype = self.own(start, stop), self.rows(start, stop), self.softened, weight_N.dtype
        weight_C1 = weight_N[start:stop, None]
        return TeacherBlock(
            rows,
            logits_cU,
            softened.head_ids_Nk[places],
            softened.head_log_prob_Nk[places].to(dtype),
            softened.tail_log_prob_N[places, None].to(dtype),
            isinstance(softened.tail, UniformTail),
            weight_C1 if rows is None else weight_C1[rows],
            self.projection,
        )


@dataclass(frozen=True, eq=False)
class TeacherBlock:
    """View of a teacher on a block of C positions."""

    rows: Tensor | None  # of the C, at which it speaks; None: at all
    logits_cU: Tensor | None  # of a tail that has logits; overwritten
    head_ids_ck: Tensor
    head_log_prob_ck: Tensor
    tail_log_prob_c1: Tensor
    is_uniform: bool
    weight_c1: Tensor
    projection: VocabularyProjection | None

    def __len__(self) -> int:
        return len(self.weight_c1)

    def add(self, sum_cU: Tensor, scale_c1: Tensor, share_cU: Tensor) -> None:
        """sum += scale · p; `share_cU` is scratch."""
        head_ck = self.head_log_prob_ck.exp().mul_(scale_c1)
        if self.logits_cU is not None:
            self._rule_out_head()
            torch.softmax(self.logits_cU, -1, out=share_cU)
            sum_cU.addcmul_(share_cU, self.tail_log_prob_c1.exp().mul_(scale_c1))
        elif self.is_uniform:
            each_c1 = self._log_of_each(sum_cU.shape[1]).exp().mul_(scale_c1)
            sum_cU.add_(each_c1)
            head_ck = head_ck - each_c1 * self._is_first_ck()
        sum_cU.scatter_add_(1, self.head_ids_ck, head_ck)

    def add_log(self, sum_cU: Tensor, scale_c1: Tensor, share_cU: Tensor) -> None:
        """sum += scale · log p, less what is the same for all tokens."""
        head_ck, is_first_ck = self.head_log_prob_ck.clamp_min(FLOOR), self._is_first_ck()
        if self.logits_cU is not None:
            self._rule_out_head()
            torch.softmax(self.logits_cU, -1, out=share_cU)
            # log p = t + constant outside the head: the constant is left out there, and taken off inside.
            log_sum_c1 = self.logits_cU.amax(-1, keepdim=True) - share_cU.amax(-1, keepdim=True).log()
            outside_c1 = self.tail_log_prob_c1 - log_sum_c1
            self.logits_cU.scatter_(1, self.head_ids_ck, 0.0)
            sum_cU.addcmul_(self.logits_cU, scale_c1)
        elif self.is_uniform:
            outside_c1 = self._log_of_each(sum_cU.shape[1]).clamp_min(FLOOR)
        else:  # a head of all tokens
            outside_c1 = torch.zeros_like(self.tail_log_prob_c1)
        sum_cU.scatter_add_(1, self.head_ids_ck, (head_ck - outside_c1) * scale_c1 * is_first_ck)

    def _rule_out_head(self) -> None:
        assert self.logits_cU is not None
        self.logits_cU.scatter_(1, self.head_ids_ck, NOTHING)

    def _log_of_each(self, tokens: int) -> Tensor:
        """log p of each token outside the head, where all are alike."""
        outside_c1 = tokens - self._is_first_ck().sum(-1, keepdim=True)
        return self.tail_log_prob_c1 - outside_c1.clamp_min(1).to(self.tail_log_prob_c1.dtype).log()

    def _is_first_ck(self) -> Tensor:
        """Marks the head's tokens that are no padding, which repeats the first one."""
        is_first_ck = torch.ones_like(self.head_ids_ck, dtype=torch.bool)
        is_first_ck[:, 1:] = self.head_ids_ck[:, 1:] != self.head_ids_ck[:, :1]
        return is_first_ck
