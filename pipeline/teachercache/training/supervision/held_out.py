"""Evaluation on the held-out split of a cache.

All metrics are over positions, and at temperature 1 whatever the training temperature is, so that runs compare. The student
is measured as it would be sampled: over all columns of its logits, also those that no token has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.objective import NO_TARGET, DistillationObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.targets import TargetKind
from teachercache.targets.logits.kind import first_choices

# Both terms are measured: neither weight may be zero.
BOTH_TERMS = 0.5


class Measure(ABC):
    """Sums over the positions of some batches; add batches of every process, then `metrics` of the reduced sums."""

    columns: tuple[str, ...]
    sums: Tensor

    @staticmethod
    @abstractmethod
    def metrics(sums: Tensor, *, prefix: str) -> dict[str, float]:
        """From the sums of all batches."""

    @abstractmethod
    def add(self, output: StudentOutput, labels_BS: Tensor, targets: dict[str, Tensor]) -> None:
        """Add a batch by the student's output for it."""


class HeldOutMeasure(Measure):
    """Measures a student with the teacher's tokenizer."""

    def __init__(self, kind: TargetKind, *, tail: str, device: torch.device) -> None:
        config = ObjectiveConfig.model_validate({"alpha": BOTH_TERMS, "temperature": 1.0, "tail": tail})
        self._kind = kind
        self._objective = DistillationObjective(config, kind=kind)
        self.columns = self._objective.columns
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, output: StudentOutput, labels_BS: Tensor, targets: dict[str, Tensor]) -> None:
        """See `Measure`."""
        for part, logits_BSL, labels in output.blocks(labels_BS):
            self._add(logits_BSL, labels, {name: values[part] for name, values in targets.items()})

    def _add(self, logits_BSL: Tensor, labels_BS: Tensor, targets: dict[str, Tensor]) -> None:
        terms = self._objective(StudentOutput.of_logits(logits_BSL), labels_BS, targets)
        is_position_BS = labels_BS != NO_TARGET
        choice_N = logits_BSL.argmax(-1)[is_position_BS]
        correct = (choice_N == labels_BS[is_position_BS]).sum()
        agreeing = (choice_N == first_choices(self._kind, targets, xp=torch).to(choice_N)).sum()
        positions = torch.tensor(terms.positions, device=self.sums.device)
        self.sums += torch.stack([item.double() for item in (terms.ce, terms.divergence, correct, agreeing, positions)])

    @staticmethod
    def metrics(sums: Tensor, *, prefix: str) -> dict[str, float]:
        """`loss` (CE, nats per position), `perplexity`, `kl` (to the teacher), `accuracy`, `top1_agreement`."""
        ce, kl, correct, agreeing, positions = sums.tolist()
        values = {
            "loss": ce / positions,
            "perplexity": math.exp(min(ce / positions, 700.0)),
            "kl": kl / positions,
            "accuracy": correct / positions,
            "top1_agreement": agreeing / positions,
        }
        return {f"{prefix}_{name}": value for name, value in values.items()}
