"""The teacher's attention heads as the student's: every student head is a mixture of the teacher's.

    average      groups of neighbours; the head counts must divide one another
    interpolate  linear between neighbours, ends on ends (12 heads to 8)
    mix          learned: a softmax over the teacher's heads for each of the student's, from interpolation on

A mixture of distributions over keys is one again.

Shapes: H heads of the teacher, h of the student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teachercache.errors import CacheError

HEADS = ("average", "interpolate", "mix")
_FLOOR = 1e-3  # of a mixture's weights in the beginning: softmax has no zeros


def head_mixture(how: str, *, teacher: int, student: int) -> Tensor:
    """Weights [h, H] whose rows add up to 1. Raises `CacheError` for head counts that `average` cannot group."""
    if how == "average":
        return _groups(teacher, student)
    if student == 1:
        return torch.full((1, teacher), 1 / teacher)
    place_h = torch.arange(student, dtype=torch.float64) * (teacher - 1) / (student - 1)
    distance_hH = (place_h[:, None] - torch.arange(teacher, dtype=torch.float64)).abs()
    return (1 - distance_hH).clamp_min(0.0).float()


def _groups(teacher: int, student: int) -> Tensor:
    small, large = sorted((teacher, student))
    if large % small:
        raise CacheError(
            f"objective.layers: {teacher} heads of the teacher cannot be grouped for {student} of the student; use heads: "
            "interpolate or heads: mix"
        )
    block = torch.ones(1, large // small)
    spread = torch.block_diag(*[block] * small)  # [small, large]
    return spread / spread.sum(1, keepdim=True) if student <= teacher else spread.T.contiguous()


class HeadMixture(torch.nn.Module):
    """Teacher's distributions over keys to as many as the student has heads."""

    def __init__(self, how: str, *, teacher: int, student: int) -> None:
        super().__init__()
        weights_hH = head_mixture(how, teacher=teacher, student=student)
        self.learned = how == "mix"
        if self.learned:
            self.logits_hH = torch.nn.Parameter((weights_hH + _FLOOR).log())
        else:
            self.register_buffer("weights_hH", weights_hH, persistent=False)

    def forward(self, probability_BHCS: Tensor) -> Tensor:
        """[B, H, C, S] to [B, h, C, S]."""
        weights_hH = self.logits_hH.float().softmax(-1) if self.learned else self.weights_hH
        return torch.einsum("hH,BHCS->BhCS", weights_hH.to(probability_BHCS.dtype), probability_BHCS)
