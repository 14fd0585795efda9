"""Times of a capture job: what its units have made so far, how fast, and what is to come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

ACTORS_STAGES = ("forward", "encoding", "writing")
STAGES = ("reading", "tokenising", *ACTORS_STAGES)


@dataclass
class Timing:
    """Amounts that this run has made, of `pending` units with about `documents` documents, and its times: wall seconds since
    the first position, and before it, and those of each stage, added up over all processes. `actors` run the teacher."""

    pending: int = 0
    documents: float = 0.0
    actors: int = 0
    units: int = 0
    documents_done: int = 0
    rows: int = 0
    positions: int = 0
    bytes: int = 0
    working_seconds: float = 0.0
    start_up_seconds: float = 0.0
    batches_halved: int = 0
    stage_seconds: Counter[str] = field(default_factory=Counter)
    given_up: list[str] = field(default_factory=list)  # units without a result, and why

    def add(self, *, documents: int, rows: int, positions: int, size: int, stage_seconds: Mapping[str, float]) -> None:
        """Count a unit; `size` is in bytes."""
        self.units, self.documents_done = self.units + 1, self.documents_done + documents
        self.rows, self.positions, self.bytes = self.rows + rows, self.positions + positions, self.bytes + size
        self.stage_seconds.update(stage_seconds)

    @property
    def rate(self) -> float:
        """Positions a second."""
        return self.positions / self.working_seconds if self.working_seconds > 0 else 0.0

    @property
    def positions_left(self) -> float:
        """About how many positions are to come: as many for each document as so far."""
        if self.units >= self.pending or not self.documents_done:
            return 0.0
        return self.positions / self.documents_done * max(0.0, self.documents - self.documents_done)

    @property
    def seconds_left(self) -> float:
        """About how long they will take; 0 where nothing is known yet."""
        return self.positions_left / self.rate if self.rate else 0.0

    def utilisation(self) -> dict[str, float]:
        """Returns the seconds of each stage as a share of the actors' time; `waiting` is what these were idle. Reading and
        tokenising run beside them."""
        whole = self.actors * self.working_seconds
        if not whole:
            return {}
        busy = sum(self.stage_seconds[name] for name in ACTORS_STAGES)
        seconds = {name: self.stage_seconds[name] for name in STAGES} | {"waiting": max(0.0, whole - busy)}
        return {name: round(value / whole, 4) for name, value in seconds.items()}

    def describe(self) -> str:
        """One line for people."""
        left = f", about {_duration(self.seconds_left)} left" if self.positions_left else ""
        return (
            f"{self.rows:,} rows, {self.positions:,} positions, {_size(self.bytes)}, {self.rate:,.0f} positions/s{left}"
        )


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns seconds by name, to a millisecond."""
    return {name: round(value, 3) for name, value in seconds.items()}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
