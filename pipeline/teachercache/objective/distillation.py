"""The training objective that a recipe's `objective:` section describes, for the targets that a cache holds.

Shapes: B rows, S tokens, N positions (labels other than -100, in row-major order), L columns of the
logits, at least as many as the vocabulary has tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.errors import ModelError
from teachercache.objective.kl import distillation_sums
from teachercache.objective.operands import TeacherHead, Weights
from teachercache.targets import grid_index, target_kind
from teachercache.targets.temperature import softened

NO_TARGET = -100  # label of a token that is not a position, as everywhere in transformers


@dataclass(frozen=True)
class LossTerms:
    """Sums over positions, in nats. `total` = alpha · T² · kl + (1 - alpha) · ce carries the gradient.

    Without a teacher (alpha = 0) `kl` is not measured and stands at 0.
    """

    total: Tensor
    kl: Tensor
    ce: Tensor
    positions: int


def required_columns(config: ObjectiveConfig, targets: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns of the cache that the objective reads; none without a teacher (alpha = 0)."""
    if config.alpha == 0:
        return ()
    # `top-k` is the only kind that `targets.target_kind` lets through; the next one adds its own columns and head here.
    return ("head_ids", "head_logits", "tail_log_partition")


class DistillationObjective:
    """Loss of a student against a cache's targets.

    `targets` are the settings in the cache's manifest. Raises `CacheError` for a kind of targets that this version
    cannot read, and for a temperature that is not on the cache's grid.
    """

    def __init__(self, config: ObjectiveConfig, *, targets: Mapping[str, Any], vocabulary_size: int) -> None:
        self.config = config
        self.vocabulary_size = vocabulary_size
        if config.alpha > 0:
            target_kind(dict(targets), vocabulary_size=vocabulary_size)
            grid_index(targets["temperatures"], config.temperature)
            self._grid = tuple(targets["temperatures"])
        self._weights = Weights(config.alpha, config.temperature if config.alpha > 0 else 1.0)

    def __call__(
        self, logits_BSL: Tensor, shift_labels_BS: Tensor, targets: Mapping[str, Tensor] | None = None
    ) -> LossTerms:
        """Loss sums of one batch; a batch without positions gives zeros that still reach the logits.

        `shift_labels_BS[b, s]` is the token that follows token s, or -100. `targets` holds the columns that
        `required_columns` names, each [N, …]; they may lie on another device. Raises `ModelError` when the student
        predicts fewer tokens than the cache's vocabulary has.
        """
        if logits_BSL.shape[-1] < self.vocabulary_size:
            raise ModelError(
                f"the student predicts {logits_BSL.shape[-1]} tokens, but the cache's tokenizer has "
                f"{self.vocabulary_size}; train one with the teacher's tokenizer (see `teachercache init-student`)"
            )
        labels_R = shift_labels_BS.reshape(-1)
        positions_N = (labels_R != NO_TARGET).nonzero()[:, 0]
        labels_N = labels_R[positions_N]
        total, kl, ce = distillation_sums(
            logits_BSL,
            positions_N=positions_N,
            labels_N=labels_N,
            head=self._teacher(targets or {}, labels_N, logits_BSL.dtype),
            weights=self._weights,
            vocabulary_size=self.vocabulary_size,
        )
        return LossTerms(total, kl, ce, positions=len(positions_N))

    def _teacher(self, targets: Mapping[str, Tensor], labels_N: Tensor, logits_dtype: torch.dtype) -> TeacherHead:
        dtype = torch.float64 if logits_dtype == torch.float64 else torch.float32
        if self.config.alpha == 0:
            return TeacherHead.absent(labels_N, dtype)
        ids_Nk = targets["head_ids"].to(labels_N.device, torch.int64)
        if len(ids_Nk) != len(labels_N):
            raise ValueError(f"targets of {len(ids_Nk)} positions for {len(labels_N)} labels: the batch is misaligned")
        head_Nk, tail_NG = (targets[name].to(labels_N.device, dtype) for name in ("head_logits", "tail_log_partition"))
        head = TeacherHead(ids_Nk, *softened(head_Nk, tail_NG, self._grid, self.config.temperature, torch))
        return head.renormalised() if self.config.tail == "renormalise" else head
