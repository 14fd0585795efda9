"""Documents that one cache of a run holds out, and another one has among its rows to train on: they train nowhere.

Caches hold out by the hash of a document, so that of two shares the larger one holds out all that the smaller one does. A row
is left out if any of its documents is; where all shares are equal, which is the rule, no row is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachercache.cache import Cache
from teachercache.cache.row_sources import rows_beyond
from teachercache.errors import CacheError


@dataclass(frozen=True, eq=False)
class Trained:
    """The train rows of each of a run's own caches that are trained on: their numbers, rising; None for all of them.
    `share` is the largest of what any cache holds out, if rows are left out by it."""

    rows: tuple[NDArray[np.int64] | None, ...]
    share: float | None = None
    lines: tuple[str, ...] = ()  # what is left out, for people

    def of_shards(self, number: int, cache: Cache) -> NDArray[np.int64]:
        """Counts those that each shard of a cache has."""
        counts = cache.infos.counted("rows") - cache.infos.counted("held_out_rows")
        rows = self.rows[number] if number < len(self.rows) else None
        if rows is None:
            return counts
        return np.diff(np.searchsorted(rows, np.append(0, np.cumsum(counts))))


def trained_rows(caches: Sequence[Cache], other_teachers: Sequence[Cache] = ()) -> Trained:
    """Selects the rows of a run's own caches that it learns from together with `other_teachers`' caches.

    Raises `CacheError` where nothing is left of a cache.
    """
    shares = [float(cache.manifest.corpus.get("held_out", 0.0)) for cache in (*caches, *other_teachers)]
    largest = max(shares)
    if all(share == largest for share in shares[: len(caches)]):
        return Trained((None,) * len(caches))
    by = (*caches, *other_teachers)[shares.index(largest)].name
    rows: list[NDArray[np.int64] | None] = []
    lines = []
    for cache, share in zip(caches, shares, strict=False):
        kept = None if share == largest else rows_beyond(cache, largest)
        lost = 0 if kept is None else cache.rows_of("train") - len(kept)
        if kept is not None and not len(kept):
            raise CacheError(
                f"{cache.name} has no rows to train on beside {by}, which holds them all out (corpus.held_out {largest:g}, "
                f"here {share:g}); precompute both with the same corpus.held_out"
            )
        if lost:
            lines.append(
                f"{lost:,} of {cache.rows_of('train'):,} rows to train on of {cache.name} are left out: their documents are "
                f"held out in {by} (corpus.held_out {largest:g}, here {share:g})"
            )
        rows.append(kept if lost else None)
    return Trained(tuple(rows), largest if lines else None, tuple(lines))
