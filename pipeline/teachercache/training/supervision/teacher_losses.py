"""Losses of teachers on held-out rows, from what their caches store of the actual tokens: none of them is run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from teachercache.cache import Cache
from teachercache.objective.ensemble.fused_teacher import actual_columns
from teachercache.stream.aligned_rows import AlignedPair
from teachercache.stream.ensemble_rows import TeacherCache
from teachercache.targets.logits.kind import ACTUAL

MOST_HELD_OUT = 4096  # rows that they are measured on


def held_out_losses(own_caches: Sequence[Cache], other_teachers: Sequence[TeacherCache]) -> list[float]:
    """Mean cross-entropy of the actual tokens in each cache, on the held-out rows that all of them have; nats per position
    of the run's own cache (a teacher with other tokens spends its nats on the same text).

    At most `MOST_HELD_OUT` rows, evenly spread; the same in every process, which reads them for itself.
    """
    rows = held_out_of_all(own_caches, other_teachers)
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_HELD_OUT)).round().astype(int))]
    sums, positions = np.zeros(len(other_teachers) + 1), 0
    columns = [actual_columns(other.cache.kind, other.cache.name) for other in other_teachers]
    for source, index in chosen.tolist():
        cache = own_caches[source]
        first = cache.read_row("held-out", index, columns=actual_columns(cache.kind, cache.name), segments=False)
        rows_of_others = [
            other.read(source, "held-out", index, row_id=first.row.row_id, columns=names)
            for other, names in zip(other_teachers, columns, strict=True)
        ]
        if any(other is None for other in rows_of_others):
            continue
        stored = [
            first,
            *(other.teacher if isinstance(other, AlignedPair) else other for other in rows_of_others if other),
        ]
        kinds = [cache.kind, *(other.cache.kind for other in other_teachers)]
        sums += [
            -kind.decoded(stored_row.targets)[ACTUAL].sum(dtype=float)
            for kind, stored_row in zip(kinds, stored, strict=True)
        ]
        positions += first.row.positions
    losses: list[float] = (sums / max(positions, 1)).tolist()
    return losses


def held_out_of_all(own_caches: Sequence[Cache], other_teachers: Sequence[TeacherCache]) -> NDArray[np.int64]:
    """(own cache, row) of the held-out rows that every teacher has, [rows, 2]."""
    places = []
    for source, cache in enumerate(own_caches):
        rows = np.ones(cache.rows_of("held-out"), dtype=np.bool_)
        for other in other_teachers:
            rows &= other.rows[source]["held-out"] >= 0
        indices = np.flatnonzero(rows)
        places.append(np.stack([np.full(len(indices), source), indices], axis=1))
    return np.concatenate(places)
