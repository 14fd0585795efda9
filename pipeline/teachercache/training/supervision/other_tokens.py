"""The student has another tokenizer than the teacher: it learns through alignments, where both have read the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.manifest.alignment_manifest import AlignmentManifest
from teachercache.cache.reader import Split
from teachercache.config import ObjectiveConfig, PhaseConfig, StudentConfig
from teachercache.errors import CacheError, ModelError
from teachercache.objective import Objective
from teachercache.objective.objective_schedule import ObjectiveSchedule, ScheduleRange
from teachercache.stream.aligned_tensors import AlignedRows
from teachercache.stream.beginnings import warnings_of_alignments
from teachercache.stream.cache_rows import CacheRows
from teachercache.stream.tokenizers import student_tokenizer
from teachercache.tokens.rows import TokenRow
from teachercache.training.supervision.contract import Columns, Supervision
from teachercache.training.supervision.held_out import Measure
from teachercache.training.supervision.held_out_aligned import AlignedMeasure, aligned_objective


class OtherTokens(Supervision):
    """See `Supervision`. `alignments`, one a cache, have the rows in the student's own tokens."""

    def __init__(
        self, caches: Sequence[Cache], config: ObjectiveConfig, *, alignments: Sequence[CacheAlignment]
    ) -> None:
        super().__init__(caches, config)
        self.alignments = tuple(alignments)

    def tokens_of(self, number: int) -> AlignmentManifest:
        """See `Supervision`."""
        return self.alignments[number].manifest

    def check_tokenizers(self) -> None:
        """See `Supervision`."""
        super().check_tokenizers()
        for alignment in self.alignments:
            student_tokenizer(alignment)

    def warnings(self) -> list[str]:
        """See `Supervision`."""
        return [*super().warnings(), *warnings_of_alignments(self.caches, self.alignments)]

    def check_student(self, name: str) -> None:
        """See `Supervision`."""
        for alignment in self.alignments:
            if not alignment.infos.train_positions:
                raise ModelError(
                    f"student {name} has nothing to learn from the cache: no row to train on could be aligned with its "
                    "tokenizer (`teachercache inspect` says why)"
                )

    def check_columns(self, columns: Columns) -> None:
        """See `Supervision`."""
        for cache, names in zip(self.caches, columns, strict=True):
            if any(column.of == "pair" for column in cache.targets.columns if column.name in names):
                raise CacheError(
                    f"{cache.name} keeps attention as maps over the teacher's tokens, which a student with other tokens "
                    "cannot match; precompute it with targets.attention.kind: relations, or match hidden states"
                )

    def schedule(self, *, steps: int, phases: Sequence[PhaseConfig] = ()) -> ObjectiveSchedule:
        """See `Supervision`: its terms are those of `objective.across`."""
        return ObjectiveSchedule(self.config, steps=steps, phases=phases, across=True)

    def rows(self, number: int, split: Split, columns: tuple[str, ...]) -> CacheRows:
        """See `Supervision`."""
        return AlignedRows(self.caches[number], self.alignments[number], columns)

    def token_row(self, number: int, index: int) -> TokenRow:
        """See `Supervision`."""
        return self.alignments[number].read_row("train", index).row

    def prefetch(self, shards: Sequence[Sequence[int]], columns: Columns) -> None:
        """See `Supervision`."""
        for cache, alignment, numbers, names in zip(self.caches, self.alignments, shards, columns, strict=True):
            cache.prefetch(numbers, columns=names, caches=self.remote, with_infos=alignment.infos)

    def objective(self, number: int, schedule_range: ScheduleRange) -> Objective:
        """See `Supervision`."""
        cache, alignment = self.caches[number], self.alignments[number]
        return aligned_objective(self.config, cache, alignment, schedule_range=schedule_range)

    def measure(self, number: int, device: torch.device) -> Measure:
        """See `Supervision`."""
        return AlignedMeasure(self.caches[number], self.alignments[number], tail=self.config.tail, device=device)

    def on_evaluate(self, metrics: Mapping[str, float], *, prefix: str) -> None:
        """See `Supervision`: nothing follows evaluations."""

    def identity(self) -> dict[str, Any]:
        """See `Supervision`."""
        return {"alignments": tuple(alignment.manifest.fingerprint for alignment in self.alignments)}

    def exported_tokenizer(self, student: StudentConfig) -> AbstractContextManager[Path]:
        """See `Supervision`: the student keeps its own, whose template its rows were rendered with."""
        return self.alignments[0].tokenizer_folder()
