"""`Supervision`: what a run learns from in the rows of its caches. It is chosen once (choice.py); the
trainer, the order of rows, collation, the held-out pass, the checks before the first step and the export do not ask which one
it is.

Each file beside this one that is named after what it learns from holds one: own_tokens.py, other_tokens.py,
several_teachers.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from teachercache.cache import Cache, Manifest
from teachercache.cache.manifest.alignment_manifest import AlignmentManifest
from teachercache.cache.reader import Split
from teachercache.config import ObjectiveConfig, PhaseConfig, StudentConfig
from teachercache.errors import RecipeError
from teachercache.objective import Objective
from teachercache.objective.objective_schedule import ObjectiveSchedule, ScheduleRange
from teachercache.stream.beginnings import warnings_of
from teachercache.stream.cache_rows import CacheRows
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.tasks.contract import Task
from teachercache.tokens.rows import TokenRow
from teachercache.training.callbacks.step_losses import Stateful
from teachercache.training.supervision.held_out import Measure

Columns = Sequence[tuple[str, ...]]  # of each cache


class Supervision(ABC):
    """Supervision by `caches`, those of a run in order, and by the objective of `config`.

    `adaptive` is what it remembers beyond one step, by its name in a checkpoint.
    """

    other_caches: tuple[Cache, ...] = ()  # of further teachers: read beside the run's own
    adaptive: Mapping[str, Stateful] = {}

    def __init__(self, caches: Sequence[Cache], config: ObjectiveConfig) -> None:
        self.caches, self.config = tuple(caches), config

    @property
    def task(self) -> Task:
        """The task of all rows."""
        return self.caches[0].task

    # ------------------------------------------------------------------ before the first step

    def check_run(self, caches: Sequence[Cache], config: ObjectiveConfig) -> None:
        """Raise `RecipeError` where a run has other caches, or another objective, than this was made for."""
        if [cache.manifest.fingerprint for cache in caches] != [cache.manifest.fingerprint for cache in self.caches]:
            raise RecipeError(
                "supervision is of other caches than the trainer's; make it of the same `cache` and `mix`"
            )
        if config != self.config:
            raise RecipeError("supervision is of another objective than the trainer's; make it of the same `objective`")

    @abstractmethod
    def tokens_of(self, number: int) -> Manifest | AlignmentManifest:
        """Describes the tokens that the student reads of a cache."""

    def check_tokenizers(self) -> None:
        """Raise `CacheDamaged` where a tokenizer that lies in the caches is not the one that they were made with, before
        anything is learned: one of them is exported in the end."""
        for cache in self.caches:
            teacher_tokenizer(cache)

    def warnings(self) -> list[str]:
        """Returns a line for each of its caches whose rows do not all begin as their tokenizer has it."""
        return warnings_of([*self.caches, *self.other_caches])

    @abstractmethod
    def check_student(self, name: str) -> None:
        """Raise `ModelError` where a student of this name would have nothing to learn from."""

    @abstractmethod
    def check_columns(self, columns: Columns) -> None:
        """Raise `CacheError` for columns of the caches that cannot be learned from in this way."""

    @abstractmethod
    def schedule(self, *, steps: int, phases: Sequence[PhaseConfig] = ()) -> ObjectiveSchedule:
        """The settings of every step."""

    # ------------------------------------------------------------------ rows

    @abstractmethod
    def rows(self, number: int, split: Split, columns: tuple[str, ...]) -> CacheRows:
        """The rows of a cache, with these of its columns."""

    @abstractmethod
    def token_row(self, number: int, index: int) -> TokenRow:
        """Returns a row to train on of a cache, as the student reads it."""

    @property
    def remote(self) -> int:
        """The number of caches that lie in object stores."""
        return sum(cache.is_remote for cache in (*self.caches, *self.other_caches))

    def prefetch(self, shards: Sequence[Sequence[int]], columns: Columns) -> None:
        """Have fetched what holds these columns of these shards of each cache, and what lies beside them, where caches are in
        an object store."""
        for cache, numbers, names in zip(self.caches, shards, columns, strict=True):
            cache.prefetch(numbers, columns=names, caches=self.remote)

    # ------------------------------------------------------------------ losses and measures

    @abstractmethod
    def objective(self, number: int, schedule_range: ScheduleRange) -> Objective:
        """The loss in the rows of a cache, over what a run asks for."""

    @property
    def divergence_name(self) -> str | None:
        """Name of the objective's divergence in logs; None where it is made of terms with names of their own."""
        return None

    @abstractmethod
    def measure(self, number: int, device: torch.device) -> Measure:
        """Returns what measures a student on the held-out rows of a cache."""

    @abstractmethod
    def on_evaluate(self, metrics: Mapping[str, float], *, prefix: str) -> None:
        """Take in what an evaluation has found; its names begin with `prefix`."""

    # ------------------------------------------------------------------ what a run folder says

    def identity(self) -> dict[str, Any]:
        """Returns the part of it that decides what is learned, as arguments of `RunIdentity`."""
        return {}

    def lines(self) -> Sequence[str]:
        """The same for people, before training."""
        return ()

    @abstractmethod
    def exported_tokenizer(self, student: StudentConfig) -> AbstractContextManager[Path]:
        """A folder with the tokenizer files of the student that leaves a run: those that made its rows."""

    def report(self, log_history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns its part of a finished run's summary."""
        return {}
