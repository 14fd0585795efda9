"""The contract of an objective with those who train by it: a function of a student's output and a batch, to sums over
positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.student_output import StudentOutput


@dataclass(frozen=True)
class LossTerms:
    """Sums over positions, in nats. `total` = alpha · T² · divergence + (1 - alpha) · ce carries the gradient.

    All three are weighted where the objective was called with weights. Without a teacher (alpha = 0) `divergence` is
    not measured and stands at 0.
    """

    total: Tensor
    divergence: Tensor
    ce: Tensor
    positions: int
    weighed: Tensor | None = None  # what alpha weighs, detached: T² · divergence, or the terms across tokenizers
    named: Mapping[str, Tensor] = field(default_factory=dict)  # sums of further terms, and of what they measure
    counts: Mapping[str, int] = field(default_factory=dict)  # of what these are sums over, where that is not positions


class Objective(Protocol):
    """The loss of a student against one cache: `columns` are those of the cache that it reads, `names` those of what
    `LossTerms.named` has in training."""

    config: ObjectiveConfig
    columns: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """In logs."""

    def __call__(
        self,
        output: StudentOutput,
        shift_labels_BS: Tensor,
        targets: Mapping[str, Tensor] | None = None,
        *,
        weights: Weights | None = None,
        position_ids_BS: Tensor | None = None,
    ) -> LossTerms:
        """Loss sums of one batch: `targets` are what the collator made of `columns`, `weights` those of this step (default: of
        the first step), and `position_ids_BS` say where rows begin, where there are several in a sequence."""
