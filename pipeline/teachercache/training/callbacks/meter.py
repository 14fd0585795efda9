"""Loss terms of a logging window, summed over micro-batches and processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from teachercache.objective import LossTerms

# Names of the divergences in the log.
LOGGED_AS = {"forward-kl": "kl", "reverse-kl": "reverse_kl", "jensen-shannon": "jsd", "total-variation": "tv"}


@dataclass(frozen=True)
class LoggingWindow:
    """Means over the positions of a window, in nats; `divergence` is at the training temperature, unscaled."""

    total: float
    divergence: float
    ce: float
    positions: int
    seconds: float
    waiting: float  # share of the time in which a process had no batch to work on, mean over processes
    named: Mapping[str, float] = field(default_factory=dict)  # further terms and what they measure

    @property
    def positions_per_second(self) -> float:
        """Over all processes, time for loading included."""
        return self.positions / self.seconds if self.seconds else 0.0


class LossMeter:
    """Sums of loss terms since the last `take`. Adding is asynchronous on a GPU; taking is a collective."""

    def __init__(self, accelerator: Any, names: Sequence[str] = ()) -> None:
        self._accelerator = accelerator
        self._names = tuple(names)  # of further terms, and of what they measure
        self._sums = torch.zeros(5 + 2 * len(names), dtype=torch.float64, device=accelerator.device)
        self._started: float | None = None
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches batches. Time begins to count with the first one of a window; evaluation and checkpoints
        lie between windows."""
        began = time.perf_counter()
        if self._started is None:
            self._started = began
        yield
        self._waited += time.perf_counter() - began

    def add(self, terms: LossTerms) -> None:
        """Add the sums of one micro-batch."""
        sums = torch.stack([terms.total.detach(), terms.divergence.detach(), terms.ce.detach()]).double()
        self._sums[:3] += sums
        self._sums[3] += terms.positions
        self._sums[4] += terms.positions if terms.weighed is not None else 0  # steps may do without the teacher
        for place, name in enumerate(self._names, start=5):
            if name in terms.named:
                self._sums[place] += terms.named[name].double()
                # Caches of a mix may have pairs of their own; shares are of chunks.
                self._sums[place + len(self._names)] += terms.counts.get(name, terms.positions)

    def take(self) -> LoggingWindow:
        """The window over all processes; the next one begins empty."""
        seconds = time.perf_counter() - self._started if self._started is not None else 0.0
        waiting = torch.tensor([self._waited / seconds if seconds else 0.0]).to(self._sums)
        reduced = self._accelerator.reduce(torch.cat([self._sums, waiting]), "sum")
        total, divergence, ce, positions, compared, *further, waiting_sum = reduced.tolist()
        self._sums.zero_()
        self._started, self._waited = None, 0.0
        count = max(positions, 1)
        share = waiting_sum / self._accelerator.num_processes
        sums, counts = further[: len(self._names)], further[len(self._names) :]
        means = {name: value / n for name, value, n in zip(self._names, sums, counts, strict=True) if n}
        divergence /= max(compared, 1)
        return LoggingWindow(total / count, divergence, ce / count, int(positions), seconds, share, means)
