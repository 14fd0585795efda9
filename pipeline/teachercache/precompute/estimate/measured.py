"""Measurements of an estimate: seconds of stages on the clock and on all processors, and what rows hold."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teachercache.tokens.rows import TokenRow


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and those that processors worked in them, of all threads together."""

    seconds: float = 0.0
    processor: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.processor + other.processor)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.seconds * times, self.processor * times)


class Stopwatch:
    """Costs of named stages of this process; a stage that runs again adds to its cost."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Measure a block."""
        began, worked = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            cost = Cost(time.perf_counter() - began, time.process_time() - worked)
            self.costs[stage] = self.costs.get(stage, Cost()) + cost


@dataclass(frozen=True)
class Amount:
    """The contents of some rows. `pairs` are those of a token and one of its segment that is not after it."""

    rows: float = 0
    positions: float = 0
    held_out_positions: float = 0
    tokens: float = 0
    pairs: float = 0

    @classmethod
    def of(cls, rows: list[TokenRow]) -> Amount:
        """The sums over rows."""
        return cls(
            rows=len(rows),
            positions=sum(row.positions for row in rows),
            held_out_positions=sum(row.positions for row in rows if row.held_out),
            tokens=sum(row.length for row in rows),
            pairs=sum(row.pairs for row in rows),
        )

    def __mul__(self, times: float) -> Amount:
        return Amount(**{name: value * times for name, value in vars(self).items()})
