"""From the student's width to the teacher's: a linear map and a LayerNorm (FitNets, Romero et al. 2015, with a norm).

It maps the student's states, not the teacher's: a target that could be trained would shrink to whatever is easiest to
match. It learns with the student, is saved in checkpoints, and is no part of what is exported.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Adapter(torch.nn.Module):
    """[…, Ds] to […, Dt], in float32."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(student_width, teacher_width)
        self.norm = torch.nn.LayerNorm(teacher_width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.linear(hidden.to(self.linear.weight.dtype))).float()
