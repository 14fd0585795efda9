"""Metrics of a job in Ray's own: its dashboard shows them, and Prometheus collects them from each node.

ray_teachercache_rows_total, ray_teachercache_positions_total, ray_teachercache_bytes_total   made by each actor's process
ray_teachercache_positions_per_second, ray_teachercache_seconds_left                    of the job, as its driver knows them
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

_TAGS = ("cache",)


class ActorMetrics:
    """Counters of what an actor has made for a cache."""

    def __init__(self, cache: str) -> None:
        described = {
            "rows": "rows of the cache that were written",
            "positions": "positions that the teacher predicted",
            "bytes": "bytes of the shards that were written",
        }
        self._counters = {
            name: Counter(f"teachercache_{name}", description=text, tag_keys=_TAGS) for name, text in described.items()
        }
        self._tags = {"cache": cache}

    def add(self, *, rows: int, positions: int, size: int) -> None:
        """Count a unit; `size` is in bytes."""
        for name, value in (("rows", rows), ("positions", positions), ("bytes", size)):
            if value:  # Ray's counters take no zero
                self._counters[name].inc(value, tags=self._tags)


class JobMetrics:
    """Gauges of a job."""

    def __init__(self, cache: str) -> None:
        self._rate = Gauge("teachercache_positions_per_second", description="since the first unit", tag_keys=_TAGS)
        self._left = Gauge("teachercache_seconds_left", description="by positions, at this rate", tag_keys=_TAGS)
        self._tags = {"cache": cache}

    def set(self, *, rate: float, seconds_left: float) -> None:
        """Say how fast the job is, in positions a second, and how long it will take yet."""
        self._rate.set(rate, tags=self._tags)
        self._left.set(seconds_left, tags=self._tags)
