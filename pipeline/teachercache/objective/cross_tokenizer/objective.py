"""The terms of `objective.across` against one cache and its alignment. `terms_of` is where terms are dispatched.

Shapes: B rows, S tokens of the student, N positions, L columns of the logits, U teacher's tokens, V student's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheError, ModelError, RecipeError
from teachercache.objective.contract import LossTerms
from teachercache.objective.cross_tokenizer.batch import PREFIX, Chunks
from teachercache.objective.cross_tokenizer.chunk_likelihood import ChunkLikelihood
from teachercache.objective.cross_tokenizer.projected_kl import ProjectedKL, VocabularyProjection
from teachercache.objective.cross_tokenizer.sorted_probabilities import SortedProbabilities
from teachercache.objective.cross_tokenizer.sums import Batch, Sums, across_sums_of_output, names_of
from teachercache.objective.cross_tokenizer.term import ChunkTerm, PairTerm
from teachercache.objective.logits.operands import Weights, labelled_positions
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.objective.objective_schedule import ObjectiveSchedule, ScheduleRange
from teachercache.targets import StoredTargets
from teachercache.targets.logits.boundary_mass import BOUNDARY_MASS
from teachercache.targets.logits.boundary_mass import SECTION as BOUNDARY
from teachercache.targets.logits.kind import ACTUAL


class CrossTokenizerObjective:
    """As `DistillationObjective`, for a student whose rows are aligned with the cache's.

    `first_U`, `emitted_V` and `begins_V` are those of the alignment's vocabulary map. `columns` are those of the cache that the
    objective reads. Raises `CacheError` for a temperature, tail policy or term that the cache's targets do not allow,
    `RecipeError` for a divergence, which is of one vocabulary.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        targets: StoredTargets,
        first_U: Any,
        emitted_V: Any,
        begins_V: Any,
        schedule_range: ScheduleRange | None = None,
    ) -> None:
        self.config = config
        self.vocabulary_size = len(emitted_V)
        self._kind = targets.logits
        self._projection = VocabularyProjection(torch.as_tensor(first_U), torch.as_tensor(emitted_V))
        self._first = ObjectiveSchedule(config, steps=1, across=True).at(0)
        schedule_range = schedule_range or ScheduleRange.of(config)
        self._pair_terms, self._chunk_terms = (
            terms_of(config, self._projection, replace(self._first, alpha=1.0))
            if schedule_range.uses_teacher
            else ([], [])
        )
        self._tail: str = self._kind.tail_policies[0] if config.tail == "auto" else config.tail
        for temperature in schedule_range.temperatures if self._pair_terms else ():
            self._kind.check_temperature(temperature)
        if schedule_range.uses_teacher and config.divergence != "forward-kl":
            raise RecipeError(
                f"objective.divergence: {config.divergence} means nothing to a student with another tokenizer, whose losses "
                "are those of objective.across; leave it out"
            )
        if config.emphasis is not None:
            raise RecipeError(
                "objective.emphasis weighs single tokens, and a student with another tokenizer learns from chunks of "
                "several tokens as well; leave it out, or use a student with the teacher's tokenizer"
            )
        with_boundaries = any(term.boundaries for term in self._chunk_terms)
        if with_boundaries:
            targets.check_known(BOUNDARY)
        if with_boundaries and targets.boundary is None:
            raise CacheError(
                "objective.across: chunk-likelihood weighs chunks by the teacher's mass on what may follow them, which this "
                "cache does not keep; set boundaries: false, or precompute it with targets.boundary_mass: true"
            )
        self._begins_V = torch.as_tensor(begins_V, dtype=torch.bool) if with_boundaries else None
        self.columns = self._columns(with_boundaries)

    def _columns(self, with_boundaries: bool) -> tuple[str, ...]:
        columns = list(self._kind.objective_columns(self._tail)) if self._pair_terms else []
        if self._chunk_terms:
            columns += [column.name for column in self._kind.columns if column.name.startswith(ACTUAL)]
        return tuple(dict.fromkeys([*columns, *([BOUNDARY_MASS] if with_boundaries else [])]))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sums in `LossTerms.named`."""
        return names_of(self._pair_terms, self._chunk_terms)

    def __call__(
        self,
        output: StudentOutput,
        shift_labels_BS: Tensor,
        targets: Mapping[str, Tensor] | None = None,
        *,
        weights: Weights | None = None,
        position_ids_BS: Tensor | None = None,
    ) -> LossTerms:
        """See `Objective`; `targets` are what the collator made of aligned rows."""
        self._fit(output.columns)
        positions_N, labels_N = labelled_positions(shift_labels_BS)
        batch = self._batch(targets or {}, labels_N, weights or self._first)
        return self._terms(across_sums_of_output(output, positions_N, batch), batch)

    def _terms(self, sums: Sums, batch: Batch) -> LossTerms:
        """Terms are logged a position, so that they add up to the loss; shares are of chunks."""
        counts = {name: len(batch.chunks) for term in batch.pair_terms for name in term.measured}
        nothing = sums.ce.new_zeros(())
        terms: list[PairTerm | ChunkTerm] = [*batch.pair_terms, *batch.chunk_terms]
        weighed = sum((term.weight * sums.named[term.name] for term in terms), nothing)
        return LossTerms(
            sums.total, nothing, sums.ce, len(batch.labels_N), weighed=weighed, named=sums.named, counts=counts
        )

    def _fit(self, predicted: int) -> None:
        """Take columns beyond the student's vocabulary into account, if it has such: no token of anybody's stands for them."""
        if predicted < self.vocabulary_size:
            raise ModelError(
                f"the student predicts {predicted} tokens, but its tokenizer has {self.vocabulary_size}; make one whose "
                "embeddings hold them (see `teachercache init-student --tokenizer`)"
            )
        self._projection = self._projection.padded(predicted)
        if self._begins_V is not None and len(self._begins_V) < predicted:
            self._begins_V = torch.nn.functional.pad(self._begins_V, (0, predicted - len(self._begins_V)))

    def _batch(self, arrays: Mapping[str, Tensor], labels_N: Tensor, weights: Weights) -> Batch:
        chunks = Chunks.of(arrays, labels_N)
        of_teacher = {
            name: values.to(labels_N.device, torch.float32 if values.is_floating_point() else torch.int64)
            for name, values in arrays.items()
            if not name.startswith(PREFIX)
        }
        if self._projection.first_U.device != labels_N.device:
            self._projection = self._projection.to(labels_N.device)
        pair_terms, chunk_terms = terms_of(self.config, self._projection, weights)
        teachers = [self._kind.softened(of_teacher, term.temperature, tail=self._tail, xp=torch) for term in pair_terms]
        if self._begins_V is not None:
            self._begins_V = self._begins_V.to(labels_N.device)
        begins_V = self._begins_V if chunk_terms else None
        return Batch(labels_N, chunks, pair_terms, teachers, chunk_terms, begins_V, weights.alpha)


def terms_of(
    config: ObjectiveConfig, projection: VocabularyProjection, weights: Weights
) -> tuple[Sequence[PairTerm], Sequence[ChunkTerm]]:
    """The terms that a recipe describes, with what they weigh in a step; none without a teacher (alpha = 0)."""
    pair_terms: list[PairTerm] = []
    chunk_terms: list[ChunkTerm] = []
    for term in config.across if weights.alpha > 0 else ():
        weight = weights.terms[term.match]
        match term.match:
            case "projected-kl":
                pair_terms.append(ProjectedKL(projection, weight=weight, temperature=weights.temperature))
            case "sorted-probabilities":
                pair_terms.append(SortedProbabilities(weight, weights.temperature))
            case "chunk-likelihood":
                chunk_terms.append(ChunkLikelihood(weight, term.tau, term.boundaries))
    return pair_terms, chunk_terms


__all__ = ["CrossTokenizerObjective", "terms_of"]
