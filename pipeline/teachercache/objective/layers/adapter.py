"""From the student's width to the teacher's: a linear map and a LayerNorm (FitNets, Romero et al. 2015, with a norm).

It maps the student's states, not the teacher's: a target that could be trained would shrink to whatever is easiest to
match. It learns with the student, is saved in checkpoints, and is no part of what is exported.

Where both are equally wide it begins as the identity, less the teacher's mean where targets are: a student that is made of
the teacher's own layers has states in the teacher's coordinates, and would first have to undo a random map.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


class Adapter(torch.nn.Module):
    """[…, Ds] to […, Dt], float32; computed in the type of its weights."""

    def __init__(self, student_width: int, teacher_width: int, *, mean_D: Tensor | None = None) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(student_width, teacher_width)
        if student_width == teacher_width:
            with torch.no_grad():
                torch.nn.init.eye_(self.linear.weight)
                self.linear.bias.copy_(torch.zeros(teacher_width) if mean_D is None else -mean_D)
        self.norm = torch.nn.LayerNorm(teacher_width)

    def zero_contribution(self, like: Tensor) -> Tensor:
        """Zero, of no states at all: a process that has none gathers and reduces the weights all the same."""
        states_ND: Tensor = self(like.new_zeros(0, self.linear.in_features))
        return states_ND.sum()

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.linear(hidden.to(self.linear.weight.dtype)))
        return normed.float()


def zero_contribution_of_all(adapters: torch.nn.ModuleList, like: Tensor) -> Tensor:
    """Zero, by all of them in their order."""
    zeros = (cast(Adapter, adapter).zero_contribution(like) for adapter in adapters)
    return sum(zeros, like.new_zeros(()))
