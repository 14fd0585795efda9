"""Several caches' teachers as one: what a batch holds of each, weighted by position and fused at the current temperature.

Shapes: N positions of a batch, n of them at which a further teacher speaks, K teachers, V student's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig, TeachersConfig
from teachercache.errors import CacheError, RecipeError
from teachercache.objective.cross_tokenizer.projected_kl import VocabularyProjection
from teachercache.objective.ensemble.fused_tail import FusedTail
from teachercache.objective.ensemble.teacher_view import TeacherView
from teachercache.objective.ensemble.weights import TeacherWeights, by_confidence, shared_out, with_a_base
from teachercache.objective.logits.teacher import in_type
from teachercache.targets import TAIL_POLICIES, Softened, TargetKind
from teachercache.targets.logits.kind import ACTUAL


@dataclass(frozen=True, eq=False)
class EnsembleMember:
    """One of the teachers: how its targets are read. `projection` leads from its tokens to the student's, where it has others;
    `name` is its cache, for messages."""

    kind: TargetKind
    name: str
    projection: VocabularyProjection | None = None


class FusedTeacher:
    """The teachers of one cache of a run, its own first; a `Teacher`.

    `prior` are the recipe's weights; `shared` what all caches of the run multiply them by. `columns` are those that are read
    of the first teacher's cache, `other_columns` those of the others. Raises `CacheError` or `RecipeError` where targets
    cannot be fused.
    """

    def __init__(
        self,
        members: Sequence[EnsembleMember],
        config: TeachersConfig,
        *,
        objective: ObjectiveConfig,
        prior: Sequence[float],
        shared: TeacherWeights,
    ) -> None:
        self.members, self.prior, self.shared = tuple(members), tuple(prior), shared
        self.config = config
        self.tails = tuple(tail_to_fuse(member, objective, config) for member in members)
        columns = [
            (*member.kind.objective_columns(policy), *self._of_confidence(member))
            for member, policy in zip(members, self.tails, strict=True)
        ]
        self.columns: tuple[str, ...] = columns[0]
        self.other_columns: tuple[tuple[str, ...], ...] = tuple(columns[1:])
        self.names = tuple(f"weight_teacher_{number}" for number in range(len(members)))
        self._projections = [member.projection for member in members]

    @property
    def vocabulary_size(self) -> int:
        """See `Teacher`: the first one's."""
        return self.members[0].kind.vocabulary_size

    def check_temperatures(self, temperatures: Sequence[float]) -> None:
        """See `Teacher`: all of them must be readable there."""
        for temperature in temperatures:
            for member in self.members:
                member.kind.check_temperature(temperature)

    def softened(
        self, targets: Mapping[str, Tensor], temperature: float, *, like: Tensor, dtype: torch.dtype
    ) -> Softened:
        """See `Teacher`; `stream.ensemble_rows` says what a batch holds of further ones.

        A position where no teacher has a weight has no mass at all: nothing is learned from teachers there.
        """
        teacher_arrays = self._own(targets, like=like, dtype=dtype)
        if self._first_alone(teacher_arrays):
            return self._read(0, teacher_arrays[0], temperature)
        teacher_views = self._teacher_views(teacher_arrays, temperature)
        return self._fused(teacher_views, self.weights(teacher_views, teacher_arrays))

    def each(
        self, targets: Mapping[str, Tensor], temperature: float, *, like: Tensor, dtype: torch.dtype
    ) -> tuple[list[Softened], Tensor]:
        """Every teacher by itself where all of them speak, and where that is, bool [N]: what they say elsewhere does not
        compare. One with other tokens is completed by the first."""
        teacher_views = self._teacher_views(self._own(targets, like=like, dtype=dtype), temperature)
        all_N = _speaking(teacher_views).all(-1)
        weight_N1 = all_N[:, None].to(dtype)
        completed = [self._fused(teacher_views[:1], weight_N1)]
        for teacher_view in teacher_views[1:]:
            completed.append(
                self._fused(
                    [teacher_views[0], teacher_view], torch.cat([torch.zeros_like(weight_N1), weight_N1], dim=1)
                )
            )
        return completed, all_N

    def _teacher_views(self, teacher_arrays: Sequence[Mapping[str, Tensor]], temperature: float) -> list[TeacherView]:
        first = self._read(0, teacher_arrays[0], temperature)
        teacher_views = [TeacherView.of(first, None, positions=len(first))]
        for number, arrays in enumerate(teacher_arrays[1:], start=1):
            projection = self._projection(number, first.tail_log_prob_N.device)
            softened = self._read(number, arrays, temperature)
            teacher_views.append(TeacherView.of(softened, arrays["at"], positions=len(first), projection=projection))
        return teacher_views

    def _fused(self, teacher_views: Sequence[TeacherView], weight_NK: Tensor) -> Softened:
        tail_log_prob_N = weight_NK.sum(-1).gt(0).to(weight_NK.dtype).log()
        native = [teacher_view.projection is None for teacher_view in teacher_views]
        tail = FusedTail(teacher_views, with_a_base(weight_NK, native), self.config.fusion, self.vocabulary_size)
        no_head_N0 = teacher_views[0].softened.head_ids_Nk[:, :0]
        return Softened(no_head_N0, weight_NK.new_empty(no_head_N0.shape), tail_log_prob_N, tail)

    def weights(self, teacher_views: Sequence[TeacherView], teacher_arrays: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Each position's weights, [N, K]: they sum to 1, or are all 0."""
        speaks_NK, like_N = _speaking(teacher_views), teacher_views[0].softened.tail_log_prob_N
        weight_NK = like_N.new_tensor(self._factors).expand(speaks_NK.shape)
        if self.config.weights == "confidence":
            nats_NK = like_N.new_zeros(speaks_NK.shape)
            for number, (teacher_view, arrays) in enumerate(zip(teacher_views, teacher_arrays, strict=True)):
                nats_NK[teacher_view.at_n, number] = arrays["nats"] if number else -arrays[ACTUAL]
            weight_NK = weight_NK * by_confidence(nats_NK, speaks_NK)
        if self.config.missing == "skip":
            for arrays in teacher_arrays[1:]:
                speaks_NK &= arrays["has"].bool()[:, None]
        return shared_out(weight_NK, speaks_NK)

    @property
    def _factors(self) -> list[float]:
        """Weights that are the same at all positions."""
        return [prior * factor for prior, factor in zip(self.prior, self.shared.factors, strict=True)]

    def chosen(self, targets: Mapping[str, Tensor], index_M: Tensor) -> dict[str, Tensor]:
        """See `Teacher`; a further teacher's arrays are of the positions at which it speaks."""
        chosen = {}
        for name, values in targets.items():
            teacher, _, array = name.rpartition("/")
            if not teacher or array == "has":
                chosen[name] = values[index_M.to(values.device)]
                continue
            at_n = targets[f"{teacher}/at"]
            index = index_M.to(at_n.device)
            kept_n = torch.isin(at_n, index)
            chosen[name] = (
                torch.searchsorted(index, at_n[kept_n]) if array == "at" else values[kept_n.to(values.device)]
            )
        return chosen

    def measured(self, softened: Softened) -> dict[str, Tensor]:
        """Sums of weights over positions, by the names in `names`."""
        if isinstance(softened.tail, FusedTail):
            sums = softened.tail.weight_NK.sum(0).unbind()
        else:
            count = softened.tail_log_prob_N.new_tensor(float(len(softened)))
            sums = (count, *(torch.zeros_like(count) for _ in self.members[1:]))
        return dict(zip(self.names, sums, strict=True))

    def _own(self, targets: Mapping[str, Tensor], *, like: Tensor, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """Splits a batch's arrays by teacher."""
        arrays = in_type(targets, like=like, dtype=dtype)
        further = [f"teacher{number}/" for number in range(1, len(self.members))]
        first = {name: values for name, values in arrays.items() if "/" not in name}
        others = [
            {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
            for prefix in further
        ]
        return [first, *others]

    def _read(self, number: int, arrays: Mapping[str, Tensor], temperature: float) -> Softened:
        return self.members[number].kind.softened(arrays, temperature, tail=self.tails[number], xp=torch)

    def _projection(self, number: int, device: torch.device) -> VocabularyProjection | None:
        """On the device of a batch; brought there once."""
        projection = self._projections[number]
        if projection is not None and projection.first_U.device != device:
            projection = self._projections[number] = projection.to(device)
        return projection

    def _first_alone(self, teacher_arrays: Sequence[Mapping[str, Tensor]]) -> bool:
        """Tells whether nothing is to be fused in this batch, as far as that is known without a look at its numbers."""
        factors = self._factors
        silent = all(
            not len(arrays["at"]) or factor == 0 for arrays, factor in zip(teacher_arrays[1:], factors[1:], strict=True)
        )
        return silent and factors[0] > 0 and self.config.missing != "skip"

    def _of_confidence(self, member: EnsembleMember) -> tuple[str, ...]:
        if self.config.weights != "confidence":
            return ()
        return actual_columns(member.kind, member.name)


def actual_columns(kind: TargetKind, name: str) -> tuple[str, ...]:
    """The column that holds the actual token's log-probability. Raises `CacheError` where there is none."""
    names = tuple(column.name for column in kind.columns if column.name.startswith(ACTUAL))
    if not names:
        raise CacheError(
            f"{name} does not hold the log-probability of the tokens that follow, which teachers.weights asks for; use "
            "weights: fixed, or precompute it again"
        )
    return names


def tail_to_fuse(member: EnsembleMember, objective: ObjectiveConfig, config: TeachersConfig) -> str:
    """Returns the tail policy of a teacher that is fused with others: every token needs a share of its own."""
    policies, tail = member.kind.tail_policies, objective.tail
    if tail != "auto" and not TAIL_POLICIES[tail].tells_tokens_apart:
        raise RecipeError(
            f"objective.tail: {tail} keeps all tokens outside the head as one, which heads of several teachers share in no "
            "common way; use auto, sketch or uniform to fuse them"
        )
    apart = [name for name in policies if TAIL_POLICIES[name].tells_tokens_apart]
    chosen = next((name for name in apart if tail in ("auto", name)), None)
    if chosen is None:
        member.kind.objective_columns("sketch" if tail == "auto" else tail)  # says which policies there are
        raise CacheError(f"{member.name} has no tail policy to fuse by; it has {', '.join(policies)}")
    keeps_mass = TAIL_POLICIES[chosen].keeps_mass
    if not keeps_mass and config.fusion == "geometric":
        raise CacheError(
            f"{member.name} gives no mass to tokens outside its head ({member.kind.kind}, objective.tail {tail}), which a "
            "geometric mean would take over for all teachers; use teachers.fusion: arithmetic"
            + (", or objective.tail: auto" if "uniform" in policies else "")
        )
    if not keeps_mass and objective.divergence == "reverse-kl":
        raise CacheError(
            f"reverse-kl is infinite against {member.name} ({member.kind.kind}), which gives tokens outside its head no mass; "
            "use divergence: forward-kl"
        )
    return chosen


def _speaking(teacher_views: Sequence[TeacherView]) -> Tensor:
    """Marks the teachers that speak at each position, bool [N, K]."""
    first_N = teacher_views[0].softened.tail_log_prob_N
    speaks_NK = torch.zeros(len(first_N), len(teacher_views), dtype=torch.bool, device=first_N.device)
    for number, teacher_view in enumerate(teacher_views):
        speaks_NK[teacher_view.at_n, number] = True
    return speaks_NK
