"""What teachers lose on held-out rows, from what their caches store of the actual tokens: none of them is run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from teachercache.cache import Cache
from teachercache.objective.ensemble.fused_teacher import actual_columns
from teachercache.stream.aligned_rows import JoinedRow
from teachercache.stream.ensemble_rows import TeacherCache
from teachercache.targets.logits.kind import ACTUAL

MOST_HELD_OUT = 4096  # rows that they are measured on


def held_out_losses(own: Sequence[Cache], other_teachers: Sequence[TeacherCache]) -> list[float]:
    """Mean cross-entropy of the actual tokens in each cache, on the held-out rows that all of them have; nats per position
    of the run's own cache (a teacher with other tokens spends its nats on the same text).

    At most `MOST_HELD_OUT` rows, evenly spread; the same in every process, which reads them for itself.
    """
    rows = held_out_of_all(own, other_teachers)
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_HELD_OUT)).round().astype(int))]
    sums, positions = np.zeros(len(other_teachers) + 1), 0
    columns = [actual_columns(each.cache.kind, each.cache.name) for each in other_teachers]
    for source, index in chosen.tolist():
        cache = own[source]
        first = cache.read_row("held-out", index, columns=actual_columns(cache.kind, cache.name), segments=False)
        found = [
            each.read(source, "held-out", index, row_id=first.row.row_id, columns=names)
            for each, names in zip(other_teachers, columns, strict=True)
        ]
        if any(each is None for each in found):
            continue
        stored = [first, *(each.teacher if isinstance(each, JoinedRow) else each for each in found if each)]
        kinds = [cache.kind, *(each.cache.kind for each in other_teachers)]
        sums += [-kind.decoded(each.targets)[ACTUAL].sum(dtype=float) for kind, each in zip(kinds, stored, strict=True)]
        positions += first.row.positions
    return (sums / max(positions, 1)).tolist()


def held_out_of_all(own: Sequence[Cache], other_teachers: Sequence[TeacherCache]) -> NDArray[np.int64]:
    """(own cache, row) of the held-out rows that every teacher has, [rows, 2]."""
    found = []
    for source, cache in enumerate(own):
        rows = np.ones(cache.rows_of("held-out"), dtype=np.bool_)
        for each in other_teachers:
            rows &= each.rows[source]["held-out"] >= 0
        indices = np.flatnonzero(rows)
        found.append(np.stack([np.full(len(indices), source), indices], axis=1))
    return np.concatenate(found)
