"""Batch plan: the rows that a training step sees, and those of them that a process sees.

Optimizer step t belongs to epoch t // steps_per_epoch; an epoch visits every row exactly once. The rows of a step (the
*global batch*) are cut into micro-batches, each of rows of one cache, and micro-batch j goes to process j mod W. All
processes run the same number of micro-batches, so collectives cannot hang: where a global batch does not fill them (the
last one of an epoch, or a number of processes that does not divide it) the missing ones are empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from teachercache.stream.order.mixture import Mixture


@dataclass(frozen=True)
class BatchPlan:
    """The rows of every step of a run: a pure function of its fields, and of nothing else."""

    order: Mixture  # of the rows of one cache or several
    global_batch: int  # rows in an optimizer step
    micro_batch: int  # most rows in a forward pass of one process
    world_size: int

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return self.order.rows

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last one may be short."""
        return math.ceil(self.rows / self.global_batch)

    @property
    def micro_steps(self) -> int:
        """Forward passes that each process makes in a step; each further cache begins a micro-batch of its own."""
        micro_batches = math.ceil(self.global_batch / self.micro_batch) + self.order.sources - 1
        return math.ceil(micro_batches / self.world_size)

    def steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs, at least one."""
        return max(1, math.ceil(round(epochs * self.steps_per_epoch, 6)))

    def place(self, step: int) -> tuple[int, int]:
        """Epoch of optimizer step `step` (0 is the first), and the number of its first row there."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, within * self.global_batch

    def micro_steps_at(self, step: int) -> int:
        """Forward passes that each process makes in this step: in all alike."""
        return self.micro_steps

    def shards_at(self, step: int) -> list[list[int]]:
        """The shards of each cache that hold the rows of a step and those around them, then those needed next."""
        return self.order.shards_at(*self.place(step))

    def epochs_before(self, step: int) -> float:
        """Epochs in the first `step` steps."""
        return step / self.steps_per_epoch

    def rows_before(self, step: int) -> int:
        """Rows in the first `step` steps; the last batch of an epoch may be short."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.rows + min(rest * self.global_batch, self.rows)

    def ends_phase(self, step: int) -> bool:
        """Tells whether a phase ends with the first `step` steps; no phase does here."""
        return False

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """Rows of the global batch of a step, in order; rows of several caches are numbered one cache after the other."""
        epoch, start = self.place(step)
        return self.order.rows_at(epoch, np.arange(start, min(start + self.global_batch, self.rows), dtype=np.int64))

    def micro_batches(self, step: int, *, rank: int) -> list[list[int]]:
        """The micro-batches of one process in one step, each of rows of one cache; some may be empty."""
        cut = self._cut(self.step_rows(step))
        cut += [[]] * (self.micro_steps * self.world_size - len(cut))
        return cut[rank :: self.world_size]

    def _cut(self, rows_N: NDArray[np.int64]) -> list[list[int]]:
        """All micro-batches of a step."""
        source_N = np.searchsorted(self.order.starts, rows_N, side="right")
        apart = [rows_N[source_N == source] for source in np.unique(source_N)]
        counts = [math.ceil(len(rows) / self.micro_batch) for rows in apart]
        if self.order.sources == 1:
            size = self.micro_batch
            return [rows[start : start + size].tolist() for rows in apart for start in range(0, len(rows), size)]
        # Caches begin micro-batches of their own: those that there is time for anyway make all of them smaller.
        for _ in range(self.micro_steps * self.world_size - sum(counts)):
            fullest = max(range(len(apart)), key=lambda number: len(apart[number]) / counts[number])
            counts[fullest] += 1
        parts = [part for rows, count in zip(apart, counts, strict=True) for part in np.array_split(rows, count)]
        return sorted((part.tolist() for part in parts), key=len, reverse=True)


class Plan(Protocol):
    """Interface of a `BatchPlan`, or of several that follow each other (phases.py), for a run."""

    @property
    def micro_steps(self) -> int:
        """Most forward passes that a process makes in a step."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the first one."""

    def steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs."""

    def micro_steps_at(self, step: int) -> int:
        """Forward passes that each process makes in this step."""

    def micro_batches(self, step: int, *, rank: int) -> list[list[int]]:
        """The micro-batches of one process in one step."""

    def shards_at(self, step: int) -> list[list[int]]:
        """The shards of each cache that are needed now, then those needed next."""

    def epochs_before(self, step: int) -> float:
        """Epochs in the first `step` steps."""

    def rows_before(self, step: int) -> int:
        """Rows in the first `step` steps."""

    def ends_phase(self, step: int) -> bool:
        """Tells whether a phase ends with the first `step` steps."""


class PlanSampler:
    """Batch sampler for a `DataLoader`: the micro-batches of one process from the step that `first_step()` gives on.

    The step is asked for when iteration begins, which is after a trainer has restored its state: resume is a seek.
    `upcoming` is told each step before its rows are asked for. A micro-batch counts `presented` times in its length,
    for loops that present it several times.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        rank: int,
        steps: int,
        first_step: Callable[[], int],
        upcoming: Callable[[int], None] = lambda step: None,
        presented: int = 1,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.steps = steps
        self.first_step = first_step
        self.upcoming = upcoming
        self.presented = presented

    def __len__(self) -> int:
        """Micro-batches of the whole run, also where iteration begins later, were all steps as large as the largest."""
        return self.steps * self.plan.micro_steps * self.presented

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step(), self.steps):
            self.upcoming(step)
            yield from self.plan.micro_batches(step, rank=self.rank)


def spread(rows: int, *, micro_batch: int, rank: int, world_size: int, start: int = 0) -> list[list[int]]:
    """Rows `start` … `start + rows - 1` in their own order, cut into micro-batches and dealt to processes, as many (some
    empty) to each."""
    count = math.ceil(math.ceil(rows / micro_batch) / world_size) * world_size
    end = start + rows
    return [
        list(range(first, min(first + micro_batch, end)))
        for first in range(start + rank * micro_batch, start + count * micro_batch, world_size * micro_batch)
    ]
