"""The training objective that a recipe's `objective:` section describes, for the targets that a cache holds.

Shapes: B rows, S tokens, N positions (labels other than -100, in row-major order), L columns of the
logits, at least as many as the vocabulary has tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.errors import ModelError
from teachercache.objective.contract import LossTerms
from teachercache.objective.logits.divergences import divergence_of
from teachercache.objective.logits.operands import Weights, labelled_positions, no_teacher
from teachercache.objective.logits.student_output import StudentOutput, output_sums
from teachercache.objective.logits.teacher import CachedTeacher, Teacher
from teachercache.objective.objective_schedule import ObjectiveSchedule, ScheduleRange
from teachercache.objective.token_weighting.entropy import entropy_of_output, entropy_of_teacher
from teachercache.objective.token_weighting.weights import (
    EFFECTIVE,
    ENTROPY_TEMPERATURE,
    TokenWeights,
    emphasis_of,
    segments_of,
)
from teachercache.targets import Softened, TargetKind


class DistillationObjective:
    """Loss of a student against a cache's targets.

    `kind` says how the cache's targets are read (`Cache.kind`), `schedule_range` what a run asks of them (by default what
    `config` alone does), `teacher` whom it learns from (by default the cache's). `columns` are those of the cache that the
    objective reads; none without a teacher. `names` are those of what is measured of its distributions. Raises `CacheError` for
    a temperature that the cache does not hold, and for a tail policy that its targets do not allow.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        kind: TargetKind,
        schedule_range: ScheduleRange | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.config = config
        self.vocabulary_size = kind.vocabulary_size
        self.columns: tuple[str, ...] = ()
        self.names: tuple[str, ...] = ()
        schedule_range = schedule_range or ScheduleRange.of(config)
        asked = (
            (ENTROPY_TEMPERATURE,) if config.emphasis is not None and config.emphasis.by != "student-entropy" else ()
        )
        self._teacher: Teacher | None = None
        if schedule_range.uses_teacher or asked:
            self._teacher = teacher or CachedTeacher(config, kind=kind)
            self._teacher.check_temperatures((*schedule_range.temperatures, *asked))
            self.columns, self.names = self._teacher.columns, self._teacher.names
        self._divergence = divergence_of(config)
        self._first = ObjectiveSchedule(config, steps=1).at(0)

    def __call__(
        self,
        output: StudentOutput,
        shift_labels_BS: Tensor,
        targets: Mapping[str, Tensor] | None = None,
        *,
        weights: Weights | None = None,
        position_weight_N: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
    ) -> LossTerms:
        """Loss sums of one batch; a batch without positions gives zeros that still reach the student's output.

        `shift_labels_BS[b, s]` is the token that follows token s, or -100. `targets` holds what the kind decodes
        from `columns`, each [N, …]; they may lie on another device. `weights` are those of this step (default: of the first
        step). `position_weight_N` multiplies each position's share of all sums, and so does what `config.emphasis` makes of
        positions; `position_ids_BS` tell it where rows begin, where there are several in a sequence. Raises `ModelError` when
        the student predicts fewer tokens than the cache's vocabulary has.
        """
        self._check_width(output.columns)
        counted = self._counted(
            _Positions.of(shift_labels_BS, targets or {}, position_weight_N),
            lambda index_N: entropy_of_output(output, positions_N=index_N),
            lambda: segments_of(shift_labels_BS, position_ids_BS),
            output.dtype,
        )
        weights = weights or self._first
        teacher = self._softened(counted, output.dtype, weights)
        sums = output_sums(
            output,
            positions_N=counted.index_N,
            labels_N=counted.labels_N,
            teacher=teacher,
            weights=weights,
            vocabulary_size=self.vocabulary_size,
            divergence=self._divergence,
            position_weight_N=counted.weight_N,
        )
        return counted.terms(sums, weights, self._measured(teacher, weights))

    def _counted(
        self,
        positions: _Positions,
        student_entropy: Callable[[Tensor], Tensor],
        segments: Callable[[], Tensor],
        logits_dtype: torch.dtype,
    ) -> _Positions:
        """The positions that count, and how much, by a recipe's emphasis; all of them, and nothing computed, without one."""
        if self.config.emphasis is None:
            return positions

        def teacher_entropy() -> Tensor:
            softened = self._softened_at(ENTROPY_TEMPERATURE, positions, logits_dtype)
            return entropy_of_teacher(softened, vocabulary_size=self.vocabulary_size)

        weighted = emphasis_of(
            self.config.emphasis,
            segments().flatten()[positions.index_N],
            student_entropy=lambda: student_entropy(positions.index_N),
            teacher_entropy=teacher_entropy,
        )
        return positions.weighted(weighted, self._teacher)

    def _check_width(self, predicted: int) -> None:
        if predicted < self.vocabulary_size:
            raise ModelError(
                f"the student predicts {predicted} tokens, but the cache's tokenizer has "
                f"{self.vocabulary_size}; train one with the teacher's tokenizer (see `teachercache init-student`)"
            )

    def _softened(self, counted: _Positions, logits_dtype: torch.dtype, weights: Weights) -> Softened:
        if weights.alpha == 0 or self._teacher is None:
            return no_teacher(counted.labels_N, _computed(logits_dtype))
        return self._softened_at(weights.temperature, counted, logits_dtype)

    def _measured(self, softened: Softened, weights: Weights) -> Mapping[str, Tensor]:
        return {} if self._teacher is None or weights.alpha == 0 else self._teacher.measured(softened)

    def _softened_at(self, temperature: float, counted: _Positions, logits_dtype: torch.dtype) -> Softened:
        assert self._teacher is not None
        labels_N, dtype = counted.labels_N, _computed(logits_dtype)
        teacher = self._teacher.softened(counted.targets, temperature, like=labels_N, dtype=dtype)
        if len(teacher) != len(labels_N):
            raise ValueError(f"targets of {len(teacher)} positions for {len(labels_N)} labels: the batch is misaligned")
        return teacher


@dataclass(frozen=True)
class _Positions:
    """Positions that the loss is summed over."""

    index_N: Tensor  # into [B · S], rising
    labels_N: Tensor
    targets: Mapping[str, Tensor]  # each [N, …]
    weight_N: Tensor | None
    count: int  # of the batch, also of those that weigh nothing
    named: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, shift_labels_BS: Tensor, targets: Mapping[str, Tensor], weight_N: Tensor | None) -> _Positions:
        index_N, labels_N = labelled_positions(shift_labels_BS)
        return cls(index_N, labels_N, targets, weight_N, len(index_N))

    def weighted(self, emphasis: TokenWeights, teacher: Teacher | None) -> _Positions:
        """Applies weights. Positions that weigh nothing are left out: their loss need not be computed."""
        weight_N = emphasis.weight_N if self.weight_N is None else self.weight_N * emphasis.weight_N
        kept_M = weight_N.nonzero()[:, 0]
        targets = {} if teacher is None else teacher.chosen(self.targets, kept_M)
        named = {EFFECTIVE: emphasis.effective}
        return _Positions(self.index_N[kept_M], self.labels_N[kept_M], targets, weight_N[kept_M], self.count, named)

    def terms(self, sums: tuple[Tensor, Tensor, Tensor], weights: Weights, measured: Mapping[str, Tensor]) -> LossTerms:
        """With what the log has besides; what is `measured` is over the positions that weigh something."""
        total, divergence, ce = sums
        weighed = divergence.detach() * weights.temperature**2 if weights.alpha > 0 else None
        counts = dict.fromkeys(measured, len(self.labels_N))
        named = {**self.named, **measured}
        return LossTerms(total, divergence, ce, self.count, weighed=weighed, named=named, counts=counts)


def _computed(logits_dtype: torch.dtype) -> torch.dtype:
    """Returns the type that the loss is computed in."""
    return torch.float64 if logits_dtype == torch.float64 else torch.float32
