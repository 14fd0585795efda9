"""Sorted probabilities against sorted probabilities: no map between vocabularies, so no knowledge of which token is which.

    Σ_i |p_(i) - q_(i)|,  both sorted, largest first; the shorter one filled up with zeros

Where a cache gives the tail as one bucket, the head's k largest are compared, and the mass of all others.

Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teachercache.targets.logits.softened import Softened


@dataclass(frozen=True)
class SortedProbabilities:
    """The term, a baseline."""

    weight: float = 1.0
    temperature: float = 1.0
    name: str = "sorted-probabilities"
    measured: tuple[str, ...] = ()

    def values(self, logits_PV: Tensor, teacher: Softened) -> tuple[Tensor, dict[str, Tensor]]:
        """See `PairTerm`."""
        student_PV = torch.softmax(logits_PV / self.temperature, dim=-1)
        if teacher.tail is None:
            return _with_bucket(student_PV, teacher), {}
        sorted_PV = student_PV.sort(dim=-1, descending=True).values
        teacher_PW = teacher.dense().exp().sort(dim=-1, descending=True).values.to(student_PV)
        ranks = min(sorted_PV.shape[1], teacher_PW.shape[1])
        values_P = (sorted_PV[:, :ranks] - teacher_PW[:, :ranks]).abs().sum(-1)
        return values_P + sorted_PV[:, ranks:].sum(-1) + teacher_PW[:, ranks:].sum(-1), {}


def _with_bucket(student_PV: Tensor, teacher: Softened) -> Tensor:
    head_Pk = teacher.head_log_prob_Nk.exp().sort(dim=-1, descending=True).values.to(student_PV)
    k = min(head_Pk.shape[1], student_PV.shape[1])
    largest_Pk = student_PV.topk(k, dim=-1).values
    rest_P = teacher.tail_log_prob_N.exp().to(student_PV) + head_Pk[:, k:].sum(-1)
    distance_P: Tensor = (largest_Pk - head_Pk[:, :k]).abs().sum(-1) + (1 - largest_Pk.sum(-1) - rest_P).abs()
    return distance_P
