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
    spread: Tensor = torch.block_diag(*[block] * small)  # [small, large]
    return spread / spread.sum(1, keepdim=True) if student <= teacher else spread.T.contiguous()


class HeadMixture(torch.nn.Module):
    """Weights [h, H], float32, by which the teacher's distributions over keys become as many as the student has heads.

    Called once a forward pass, whatever there is to mix: under ZeRO 3 every process gathers learned weights as often.
    """

    def __init__(self, how: str, *, teacher: int, student: int) -> None:
        super().__init__()
        # No buffer: training casts those to half precision, and rows would no longer add up to 1.
        self._weights_hH = head_mixture(how, teacher=teacher, student=student)
        self.learned = how == "mix"
        self.is_identity = not self.learned and torch.equal(self._weights_hH, torch.eye(*self._weights_hH.shape))
        if self.learned:
            self.logits_hH = torch.nn.Parameter((self._weights_hH + _FLOOR).log())

    def forward(self, like: Tensor) -> Tensor:
        """On the device of a tensor."""
        return self.logits_hH.float().softmax(-1) if self.learned else self._weights_hH.to(like.device)


def mixed(weights_hH: Tensor, probability_BHCS: Tensor) -> Tensor:
    """[B, H, C, S] to [B, h, C, S]."""
    return torch.einsum("hH,BHCS->BhCS", weights_hH, probability_BHCS)
