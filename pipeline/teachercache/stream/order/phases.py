"""A run in phases: which rows each step sees, where caches, their shares and the size of a step differ from phase to phase.

Rows of a cache go on where the phase before left off, so that none comes twice before all have come once, whatever the phases
between; the place in a run stays one integer, the optimizer step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from teachercache.config import PhaseConfig
from teachercache.config.phases import phase_ends
from teachercache.errors import RecipeError
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.order.mixture import Mixture


@dataclass(frozen=True)
class PhasedPlan:
    """Plans that follow each other; to trainers and samplers it is one, see `BatchPlan`."""

    parts: tuple[BatchPlan, ...]
    ends: tuple[int, ...]  # the step that follows the last one of each part

    @classmethod
    def of(cls, base: BatchPlan, phases: Sequence[PhaseConfig], *, names: Sequence[str], steps: int) -> PhasedPlan:
        """`base` holds where a phase says nothing else; `names` are those of its caches, by which phases give shares.

        Raises `RecipeError` for lengths that do not cover the steps, for unknown names, and for sizes that are no multiple of a
        micro-batch.
        """
        ends = phase_ends(phases, steps=steps)
        parts: list[BatchPlan] = []
        drawn = (0,) * len(base.order.orders)
        for phase, begin, end in zip(phases, [0, *ends[:-1]], ends, strict=True):
            global_batch = phase.global_batch or base.global_batch
            if global_batch % base.micro_batch:
                raise RecipeError(
                    f"phases: {phase.name}: global_batch ({global_batch}) must be a multiple of train.micro_batch "
                    f"({base.micro_batch})"
                )
            order = _order_of(phase, base.order, names, drawn)
            parts.append(BatchPlan(order, global_batch, base.micro_batch, base.world_size))
            drawn = order.drawn_after(*parts[-1].place(end - begin))
        return cls(tuple(parts), tuple(ends))

    def _at(self, step: int) -> tuple[BatchPlan, int]:
        """The plan of a step, and the step's number there."""
        number = min(bisect_right(self.ends, step), len(self.ends) - 1)
        return self.parts[number], step - (self.ends[number - 1] if number else 0)

    @property
    def micro_steps(self) -> int:
        """Forward passes in the largest of all steps."""
        return max(part.micro_steps for part in self.parts)

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch of the first phase."""
        return self.parts[0].steps_per_epoch

    def steps(self, epochs: float) -> int:
        """All steps: phases say how many there are."""
        return self.ends[-1]

    def micro_steps_at(self, step: int) -> int:
        """See `BatchPlan`."""
        return self._at(step)[0].micro_steps

    def micro_batches(self, step: int, *, rank: int) -> list[list[int]]:
        """See `BatchPlan`."""
        part, part_step = self._at(step)
        return part.micro_batches(part_step, rank=rank)

    def shards_at(self, step: int) -> list[list[int]]:
        """See `BatchPlan`; those of a phase to come are fetched when it begins."""
        part, part_step = self._at(step)
        return part.shards_at(part_step)

    def epochs_before(self, step: int) -> float:
        """See `BatchPlan`; epochs of phases add up."""
        return sum(part.epochs_before(part_step) for part, part_step in self._before(step))

    def rows_before(self, step: int) -> int:
        """See `BatchPlan`."""
        return sum(part.rows_before(part_step) for part, part_step in self._before(step))

    def ends_phase(self, step: int) -> bool:
        """See `BatchPlan`."""
        return step in self.ends

    def _before(self, step: int) -> list[tuple[BatchPlan, int]]:
        """Counts the first `step` steps that lie in each part."""
        begins = [0, *self.ends[:-1]]
        return [
            (part, min(max(step - begin, 0), end - begin))
            for part, begin, end in zip(self.parts, begins, self.ends, strict=True)
        ]


def _order_of(phase: PhaseConfig, order: Mixture, names: Sequence[str], drawn: Sequence[int]) -> Mixture:
    if phase.mix is None:
        return order.going_on(drawn)
    unknown = next((name for name in phase.mix if name not in names), None)
    if unknown is not None:
        raise RecipeError(
            f"phases: {phase.name}: mix names {unknown}, and the run's caches are {', '.join(names)}; add it to stream.mix"
        )
    twice = next((name for name in phase.mix if list(names).count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"phases: {phase.name}: mix names {twice}, and two caches are called so; rename a folder")
    return order.going_on(drawn, shares=[phase.mix.get(name, 0.0) for name in names])
