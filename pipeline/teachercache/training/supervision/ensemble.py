"""Several teachers in one run: their caches matched with the run's own, what they weigh, and what they say of themselves.

The run's own caches are `cache` and those of `stream.mix`; rows, layers and held-out rows are theirs. Evaluation compares with
the teacher of `cache` (`eval_kl`, `eval_top1_agreement`), so that runs with other teachers compare with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig, TeachersConfig
from teachercache.config.location import folder_name
from teachercache.objective.cross_tokenizer.projected_kl import VocabularyProjection
from teachercache.objective.ensemble import EnsembleMember, FusedTeacher, TeacherWeights
from teachercache.stream.ensemble_rows import TeacherCache
from teachercache.training.supervision.ensemble_fit import (
    check_distinct,
    check_held_out,
    check_missing,
    matched,
    priors_of,
)
from teachercache.training.supervision.teacher_losses import held_out_losses


@dataclass(frozen=True, eq=False)
class Teachers:
    """The recipe's section for the caches of a run. `priors` are the recipe's weights in rows of each of the run's own
    caches."""

    config: TeachersConfig
    own: tuple[Cache, ...]
    other_teachers: tuple[TeacherCache, ...]
    priors: tuple[tuple[float, ...], ...]
    shared: TeacherWeights

    @classmethod
    def of(
        cls, config: TeachersConfig, own_caches: Sequence[Cache], caches: Sequence[Cache], *, names: Sequence[str] = ()
    ) -> Teachers:
        """Join `caches`, those of `config.caches`, to a run's own, which `config.domains` calls by `names` (default: by their
        folders).

        Reads every row's id, in three seconds for a million rows of a cache. Raises `CacheError` or `RecipeError` for what
        cannot be learned from together.
        """
        names = names or [folder_name(cache.name) for cache in own_caches]
        priors = priors_of(config, names)
        check_distinct(own_caches, caches)
        other_teachers = tuple(matched(own_caches, cache) for cache in caches)
        check_missing(own_caches, other_teachers, policy=config.missing)
        shared = TeacherWeights(len(caches) + 1, tau=config.tau, adapts=config.weights == "validation-student")
        if config.weights.startswith("validation"):
            check_held_out(own_caches, other_teachers, weights=config.weights)
        if config.weights == "validation":
            shared.update(held_out_losses(own_caches, other_teachers))
        return cls(config, tuple(own_caches), other_teachers, priors, shared)

    # ------------------------------------------------------------------ for the trainer

    def fused(self, number: int, objective: ObjectiveConfig) -> FusedTeacher:
        """The teachers in rows of one of the run's own caches."""
        cache = self.own[number]
        members = [EnsembleMember(cache.kind, cache.name)]
        members += [
            EnsembleMember(other.cache.kind, other.cache.name, _projection(cache, other))
            for other in self.other_teachers
        ]
        return FusedTeacher(members, self.config, objective=objective, prior=self.priors[number], shared=self.shared)

    def other_columns(self, objective: ObjectiveConfig) -> tuple[tuple[str, ...], ...]:
        """Lists the columns that an objective reads of each further cache."""
        return self.fused(0, objective).other_columns

    @property
    def remote(self) -> int:
        """Number of further caches in object stores."""
        return sum(other.cache.is_remote for other in self.other_teachers)

    def prefetch(self, shards: Sequence[Sequence[int]], *, caches: int, objective: ObjectiveConfig) -> None:
        """Have fetched what an objective reads that goes with some shards of each of the run's own caches, of `caches` in
        object stores in all."""
        if not self.remote:
            return
        for other, columns in zip(self.other_teachers, self.other_columns(objective), strict=True):
            if other.cache.is_remote:
                beside = [other.shards_beside(n, numbers, self.own[n]) for n, numbers in enumerate(shards)]
                wanted = list(dict.fromkeys(number for numbers in beside for number in numbers))
                infos = other.alignment.infos if other.alignment else None
                other.cache.prefetch(wanted, columns=columns, caches=caches, with_infos=infos)

    def update_weights(self, metrics: Mapping[str, float], *, prefix: str) -> None:
        """Hear the student's distance from each teacher on held-out rows, where weights follow it."""
        if self.shared.adapts:
            self.shared.update(
                [metrics[f"{prefix}_kl_teacher_{number}"] for number in range(len(self.other_teachers) + 1)]
            )

    def identity(self) -> dict[str, Any]:
        """Returns the part of it that decides what is learned, as JSON: caches by their content, wherever they lie."""
        return {
            **self.config.model_dump(mode="json", include={"fusion", "weights", "tau", "missing"}),
            "caches": [other.cache.manifest.fingerprint for other in self.other_teachers],
            "alignments": [other.alignment and other.alignment.manifest.fingerprint for other in self.other_teachers],
            "shares": [list(prior) for prior in self.priors],
        }

    # ------------------------------------------------------------------ what they have

    def report(self, log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`cache`, `rows` to train on that it has, how many are `missing`, and its `weight`: the mean over the positions of the
        last logging window. The run's own cache first."""
        last: Mapping[str, Any] = next((record for record in reversed(log_history) if "weight_teacher_0" in record), {})
        total = sum(cache.rows_of("train") for cache in self.own)
        counts = [
            (self.own[0].name, total),
            *((other.cache.name, other.found("train")) for other in self.other_teachers),
        ]
        return [
            {"cache": name, "rows": rows, "missing": total - rows, "weight": last.get(f"weight_teacher_{number}")}
            for number, (name, rows) in enumerate(counts)
        ]

    def lines(self) -> list[str]:
        """The same for people, of the further ones."""
        policy = {"others": "learned from the others", "skip": "learned from their labels alone", "refuse": ""}
        lines = []
        for reported, other in zip(self.report([])[1:], self.other_teachers, strict=True):
            count = reported["missing"]
            missing = f"; {count:,} are missing and {policy[self.config.missing]}" if count else ""
            if missing and "packed" in (self.own[0].manifest.layout, other.cache.manifest.layout):
                missing += " (packed rows match only where they were packed alike)"
            elif missing and other.alignment is not None:
                missing += " (another tokenizer cuts documents that are longer than a row elsewhere)"
            lines.append(f"teacher {reported['cache']}: has {reported['rows']:,} of the rows to train on{missing}")
        return lines


def _projection(cache: Cache, other: TeacherCache) -> VocabularyProjection | None:
    """From a teacher's tokens to the student's; None where they are the same."""
    if other.alignment is not None:
        vocabulary = other.alignment.vocabulary
        return VocabularyProjection(torch.from_numpy(vocabulary.first_Vt), torch.from_numpy(vocabulary.emitted_Vs))
    size, own_size = other.cache.manifest.vocabulary_size, cache.manifest.vocabulary_size
    if size == own_size:
        return None
    numbers_U = torch.arange(size)  # the same tokens at the same ids, and more of them on one side
    return VocabularyProjection(torch.where(numbers_U < own_size, numbers_U, -1), torch.arange(own_size) < size)
