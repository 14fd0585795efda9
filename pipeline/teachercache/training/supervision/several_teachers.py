"""The student reads the tokens of one cache's teacher, and learns from others of the same text besides (ensemble.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from teachercache.cache import Cache
from teachercache.cache.reader import Split
from teachercache.config import ObjectiveConfig
from teachercache.objective import DistillationObjective, Objective
from teachercache.objective.objective_schedule import ScheduleRange
from teachercache.stream.cache_rows import CacheRows, OwnRows
from teachercache.stream.ensemble_rows import EnsembleRows
from teachercache.training.supervision.contract import Columns
from teachercache.training.supervision.ensemble import Teachers
from teachercache.training.supervision.held_out import Measure
from teachercache.training.supervision.held_out_ensemble import TaughtMeasure
from teachercache.training.supervision.own_tokens import OwnTokens


class SeveralTeachers(OwnTokens):
    """See `Supervision`."""

    def __init__(self, caches: Sequence[Cache], config: ObjectiveConfig, *, teachers: Teachers) -> None:
        super().__init__(caches, config)
        self.teachers = teachers
        self.other_caches = tuple(teacher.cache for teacher in teachers.other_teachers)
        self.adaptive = {"teachers": teachers.shared}

    def rows(self, number: int, split: Split, columns: tuple[str, ...]) -> CacheRows:
        """See `Supervision`; evaluation reads the others only where weights follow it."""
        own_rows = OwnRows(self.caches[number], columns)
        if split == "held-out" and not self.teachers.shared.adapts:
            return own_rows
        return EnsembleRows(own_rows, number, self.teachers.other_teachers, self.teachers.other_columns(self.config))

    def prefetch(self, shards: Sequence[Sequence[int]], columns: Columns) -> None:
        """See `Supervision`."""
        self.teachers.prefetch(shards, caches=self.remote, objective=self.config)
        super().prefetch(shards, columns)

    def objective(self, number: int, schedule_range: ScheduleRange) -> Objective:
        """See `Supervision`."""
        fused, kind = self.teachers.fused(number, self.config), self.caches[number].kind
        return DistillationObjective(self.config, kind=kind, schedule_range=schedule_range, teacher=fused)

    def measure(self, number: int, device: torch.device) -> Measure:
        """See `Supervision`."""
        if not self.teachers.shared.adapts:
            return super().measure(number, device)
        fused, kind = self.teachers.fused(number, self.config), self.caches[number].kind
        return TaughtMeasure(kind, tail=self.config.tail, device=device, teacher=fused)

    def on_evaluate(self, metrics: Mapping[str, float], *, prefix: str) -> None:
        """See `Supervision`."""
        self.teachers.update_weights(metrics, prefix=prefix)

    def identity(self) -> dict[str, Any]:
        """See `Supervision`."""
        return {"teachers": self.teachers.identity()}

    def lines(self) -> Sequence[str]:
        """See `Supervision`."""
        return self.teachers.lines()

    def report(self, log_history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `Supervision`."""
        return {"teachers": self.teachers.report(log_history)}
