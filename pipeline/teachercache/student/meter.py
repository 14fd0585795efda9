"""Loss terms of a logging window, summed over micro-batches and processes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from teachercache.objective import LossTerms

# Names of the divergences in the log.
LOGGED_AS = {"forward-kl": "kl", "reverse-kl": "reverse_kl", "jensen-shannon": "jsd", "total-variation": "tv"}


@dataclass(frozen=True)
class Window:
    """Means over the positions of a window, in nats; `divergence` is at the training temperature, unscaled."""

    total: float
    divergence: float
    ce: float
    positions: int
    seconds: float

    @property
    def positions_per_second(self) -> float:
        """Over all processes, time for loading included."""
        return self.positions / self.seconds if self.seconds else 0.0


class LossMeter:
    """Sums of loss terms since the last `take`. Adding is asynchronous on a GPU; taking is a collective."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        self._started: float | None = None

    def start(self) -> None:
        """Begin to count time, unless a window has begun already; evaluation and checkpoints lie between windows."""
        if self._started is None:
            self._started = time.perf_counter()

    def add(self, terms: LossTerms) -> None:
        """Add the sums of one micro-batch."""
        sums = torch.stack([terms.total.detach(), terms.divergence.detach(), terms.ce.detach()]).double()
        self._sums[:3] += sums
        self._sums[3] += terms.positions

    def take(self) -> Window:
        """The window over all processes; the next one begins empty."""
        total, divergence, ce, positions = self._accelerator.reduce(self._sums.clone(), "sum").tolist()
        seconds = time.perf_counter() - self._started if self._started is not None else 0.0
        self._sums.zero_()
        self._started = None
        count = max(positions, 1)
        return Window(total / count, divergence / count, ce / count, int(positions), seconds)
