"""The student reads the teacher's tokens: it learns from the distributions of one cache's teacher at every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from teachercache.cache import Manifest
from teachercache.cache.reader import Split
from teachercache.config import PhaseConfig, StudentConfig
from teachercache.objective import DistillationObjective, Objective
from teachercache.objective.objective_schedule import ObjectiveSchedule, ScheduleRange
from teachercache.stream.cache_rows import CacheRows, OwnRows
from teachercache.tokens.rows import TokenRow
from teachercache.training.callbacks.meter import LOGGED_AS
from teachercache.training.supervision.contract import Columns, Supervision
from teachercache.training.supervision.held_out import HeldOutMeasure, Measure
from teachercache.training.supervision.tokenizers import teachers_tokenizer


class OwnTokens(Supervision):
    """See `Supervision`."""

    def tokens_of(self, number: int) -> Manifest:
        """See `Supervision`."""
        return self.caches[number].manifest

    def check_student(self, name: str) -> None:
        """See `Supervision`: whatever a cache's rows hold is in the student's tokens."""

    def check_columns(self, columns: Columns) -> None:
        """See `Supervision`: all of them can be learned from."""

    def schedule(self, *, steps: int, phases: Sequence[PhaseConfig] = ()) -> ObjectiveSchedule:
        """See `Supervision`."""
        return ObjectiveSchedule(self.config, steps=steps, phases=phases)

    def rows(self, number: int, split: Split, columns: tuple[str, ...]) -> CacheRows:
        """See `Supervision`."""
        return OwnRows(self.caches[number], columns)

    def token_row(self, number: int, index: int) -> TokenRow:
        """See `Supervision`."""
        return self.caches[number].read_row("train", index, columns=()).row

    def objective(self, number: int, schedule_range: ScheduleRange) -> Objective:
        """See `Supervision`."""
        return DistillationObjective(self.config, kind=self.caches[number].kind, schedule_range=schedule_range)

    @property
    def divergence_name(self) -> str | None:
        """See `Supervision`."""
        return LOGGED_AS[self.config.divergence]

    def measure(self, number: int, device: torch.device) -> Measure:
        """See `Supervision`."""
        return HeldOutMeasure(self.caches[number].kind, tail=self.config.tail, device=device)

    def on_evaluate(self, metrics: Mapping[str, float], *, prefix: str) -> None:
        """See `Supervision`: nothing follows evaluations."""

    def exported_tokenizer(self, student: StudentConfig) -> AbstractContextManager[Path]:
        """See `Supervision`."""
        return teachers_tokenizer(student, self.caches[0])
