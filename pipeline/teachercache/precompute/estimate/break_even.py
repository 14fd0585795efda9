"""After how many student runs a cache has paid, counted in time.

Online, the teacher reads every position of every run anew. A cache is made once, and again whenever the teacher changes; a
run then reads it and rebuilds the teacher's distributions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RunTimes:
    """Seconds that `runs` students take with the cache and without it; what both share, the student's own work, is left
    out."""

    cache_seconds: float  # of making the cache once
    online_seconds: float  # of the live teacher, in one student run
    reading_seconds: float  # of the cache, in one student run

    def from_cache(self, runs: int, *, teacher_changes: int) -> float:
        """All runs learn from a cache, which is made 1 + `teacher_changes` times."""
        return (1 + teacher_changes) * self.cache_seconds + runs * self.reading_seconds

    def online(self, runs: int) -> float:
        """All runs ask a live teacher."""
        return runs * self.online_seconds

    def break_even_runs(self, *, teacher_changes: int) -> int | None:
        """The fewest runs, over all changes of the teacher, for which the cache takes less time; None: it never does."""
        saved = self.online_seconds - self.reading_seconds
        if saved <= 0:
            return None
        return math.floor((1 + teacher_changes) * self.cache_seconds / saved) + 1
