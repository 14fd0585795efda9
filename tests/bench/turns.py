"""Contestants that take turns in one process, so that what else the machine does meets them all."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

Contestants = Mapping[str, Callable[[int], None]]  # of the round's number


def compare(
    title: str,
    contestants: Contestants,
    rounds: int,
    *,
    base: str,
    of: Callable[[str], str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Medians over the rounds: of milliseconds, and of each contestant's ratios to `base` within each round. Where contestants
    have several bases, `of` says for a contestant which one."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        first = number % len(contestants)
        for name in [*contestants][first:] + [*contestants][:first]:  # no contestant always goes first
            start = clock()
            contestants[name](number)
            if number:  # the first round warms up
                seconds[name].append(clock() - start)
        print(f"{title}: round {number} of {rounds}", file=sys.stderr)
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, seconds[of(name) if of else base], strict=True))
        for name, values in seconds.items()
    }
    return {
        "milliseconds": {name: round(statistics.median(values) * 1e3, 1) for name, values in seconds.items()},
        f"ratio_to_{base}": {name: round(value, 3) for name, value in ratios.items()},
    }
