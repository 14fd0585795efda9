"""The training objective that a recipe's `objective:` section describes, for the targets that a cache holds.

Shapes: B rows, S tokens, N positions (labels other than -100, in row-major order), L columns of the
logits, at least as many as the vocabulary has tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheError, ModelError
from teachercache.objective.divergences import divergence_of
from teachercache.objective.fused import distillation_sums
from teachercache.objective.operands import Weights, no_teacher
from teachercache.objective.projected import projected_sums
from teachercache.targets import Softened, TailPolicy, TargetKind

NO_TARGET = -100  # label of a token that is not a position, as everywhere in transformers


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
    named: Mapping[str, Tensor] = field(default_factory=dict)  # sums of further terms, and of what they measure
    counts: Mapping[str, int] = field(default_factory=dict)  # of what these are sums over, where that is not positions


class DistillationObjective:
    """Loss of a student against a cache's targets.

    `kind` says how the cache's targets are read (`Cache.kind`). `columns` are those of the cache that the objective reads;
    none without a teacher (alpha = 0). Raises `CacheError` for a temperature that the cache does not hold, and for a tail
    policy that its targets do not allow.
    """

    def __init__(self, config: ObjectiveConfig, *, kind: TargetKind) -> None:
        self.config = config
        self.vocabulary_size = kind.vocabulary_size
        self.columns: tuple[str, ...] = ()
        self._kind = kind
        if config.alpha > 0:
            self._kind.check_temperature(config.temperature)
            self._tail: TailPolicy = self._kind.tail_policies[0] if config.tail == "auto" else config.tail
            if config.divergence == "reverse-kl" and self._tail == "renormalise":
                raise CacheError(
                    f"reverse-kl is infinite against targets of kind {kind.kind}, which give all other tokens no mass; "
                    "use divergence: forward-kl"
                )
            self.columns = self._kind.objective_columns(self._tail)
        self._divergence = divergence_of(config)
        self._weights = Weights(config.alpha, config.temperature if config.alpha > 0 else 1.0)

    def __call__(
        self,
        logits_BSL: Tensor,
        shift_labels_BS: Tensor,
        targets: Mapping[str, Tensor] | None = None,
        *,
        position_weight_N: Tensor | None = None,
    ) -> LossTerms:
        """Loss sums of one batch; a batch without positions gives zeros that still reach the logits.

        `shift_labels_BS[b, s]` is the token that follows token s, or -100. `targets` holds what the kind decodes
        from `columns`, each [N, …]; they may lie on another device. `position_weight_N` multiplies each position's share of all
        sums. Raises `ModelError` when the student predicts fewer tokens than the cache's vocabulary has.
        """
        self._check_width(logits_BSL.shape[-1])
        positions_N, labels_N = labelled_positions(shift_labels_BS)
        sums = distillation_sums(
            logits_BSL,
            positions_N=positions_N,
            labels_N=labels_N,
            teacher=self._teacher(targets or {}, labels_N, logits_BSL.dtype),
            weights=self._weights,
            vocabulary_size=self.vocabulary_size,
            divergence=self._divergence,
            position_weight_N=position_weight_N,
        )
        return LossTerms(*sums, positions=len(positions_N))

    def projected(
        self,
        hidden_BSD: Tensor,
        weight_LD: Tensor,
        bias_L: Tensor | None,
        shift_labels_BS: Tensor,
        targets: Mapping[str, Tensor] | None = None,
        *,
        softcap: float | None = None,
        position_weight_N: Tensor | None = None,
    ) -> LossTerms:
        """The same from what enters the student's output layer, and its weights: no logits of a whole batch are formed.

        Raises `ModelError` when the layer has fewer rows than the cache's vocabulary.
        """
        self._check_width(len(weight_LD))
        positions_N, labels_N = labelled_positions(shift_labels_BS)
        sums = projected_sums(
            hidden_BSD.reshape(-1, hidden_BSD.shape[-1])[positions_N],
            weight_LD,
            bias_L,
            labels_N=labels_N,
            teacher=self._teacher(targets or {}, labels_N, weight_LD.dtype),
            weights=self._weights,
            vocabulary_size=self.vocabulary_size,
            softcap=softcap,
            divergence=self._divergence,
            position_weight_N=position_weight_N,
        )
        return LossTerms(*sums, positions=len(positions_N))

    def _check_width(self, predicted: int) -> None:
        if predicted < self.vocabulary_size:
            raise ModelError(
                f"the student predicts {predicted} tokens, but the cache's tokenizer has "
                f"{self.vocabulary_size}; train one with the teacher's tokenizer (see `teachercache init-student`)"
            )

    def _teacher(self, targets: Mapping[str, Tensor], labels_N: Tensor, logits_dtype: torch.dtype) -> Softened:
        dtype = torch.float64 if logits_dtype == torch.float64 else torch.float32
        if self.config.alpha == 0:
            return no_teacher(labels_N, dtype)
        arrays = {
            name: values.to(labels_N.device, dtype if values.is_floating_point() else torch.int64)
            for name, values in targets.items()
        }
        teacher = self._kind.softened(arrays, self.config.temperature, tail=self._tail, xp=torch)
        if len(teacher) != len(labels_N):
            raise ValueError(f"targets of {len(teacher)} positions for {len(labels_N)} labels: the batch is misaligned")
        return teacher


def labelled_positions(shift_labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Rising indices into [B · S] of what has a label, and the labels, [N] each."""
    labels_R = shift_labels_BS.reshape(-1)
    positions_N = (labels_R != NO_TARGET).nonzero()[:, 0]
    return positions_N, labels_R[positions_N]
