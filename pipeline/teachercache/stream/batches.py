"""Which rows a training step sees, and which of them a process sees.

Optimizer step t belongs to epoch t // steps_per_epoch; an epoch visits every row exactly once. The rows of a step (the
*global batch*) are cut into micro-batches, and micro-batch j goes to process j mod W. All processes run the same number
of micro-batches, so collectives cannot hang: where a global batch does not fill them (the last one of an epoch, or a
number of processes that does not divide it) the missing ones are empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachercache.stream.order import order_key, permuted


@dataclass(frozen=True)
class BatchPlan:
    """The rows of every step of a run: a pure function of its fields, and of nothing else."""

    rows: int  # of the split
    global_batch: int  # rows in an optimizer step
    micro_batch: int  # rows in a forward pass of one process
    world_size: int
    fingerprint: str  # of the cache
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that visit every row once; the last one may be short."""
        return math.ceil(self.rows / self.global_batch)

    @property
    def micro_steps(self) -> int:
        """Forward passes that each process makes in a step."""
        return math.ceil(math.ceil(self.global_batch / self.micro_batch) / self.world_size)

    def steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs, at least one."""
        return max(1, math.ceil(round(epochs * self.steps_per_epoch, 6)))

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """Rows of the global batch of optimizer step `step` (0 is the first), in order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch
        index_N = np.arange(start, min(start + self.global_batch, self.rows), dtype=np.int64)
        return permuted(index_N, size=self.rows, key=order_key(self.fingerprint, seed=self.seed, epoch=epoch))

    def micro_batches(self, step: int, *, rank: int) -> list[list[int]]:
        """The micro-batches of one process in one step; some may be empty."""
        rows = self.step_rows(step).tolist()
        return [
            rows[number * self.micro_batch : (number + 1) * self.micro_batch]
            for number in range(rank, self.micro_steps * self.world_size, self.world_size)
        ]


class PlanSampler:
    """Batch sampler for a `DataLoader`: the micro-batches of one process from the step that `first_step()` gives on.

    The step is asked for when iteration begins, which is after a trainer has restored its state: resume is a seek.
    """

    def __init__(self, plan: BatchPlan, *, rank: int, steps: int, first_step: Callable[[], int]) -> None:
        self.plan = plan
        self.rank = rank
        self.steps = steps
        self.first_step = first_step

    def __len__(self) -> int:
        """Micro-batches of the whole run, also where iteration begins later."""
        return self.steps * self.plan.micro_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step(), self.steps):
            yield from self.plan.micro_batches(step, rank=self.rank)


def spread(rows: int, *, micro_batch: int, rank: int, world_size: int) -> list[list[int]]:
    """All rows in their own order, cut into micro-batches and dealt to processes, as many (some empty) to each."""
    count = math.ceil(math.ceil(rows / micro_batch) / world_size) * world_size
    return [
        list(range(start, min(start + micro_batch, rows)))
        for start in range(rank * micro_batch, count * micro_batch, world_size * micro_batch)
    ]
