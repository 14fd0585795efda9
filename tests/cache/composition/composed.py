"""Caches that may be joined: halves of a corpus by one teacher, the second one with the calibration of the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from teachercache.cache import SPLITS, Cache, StoredRow

from builders import sentences, tiny_cache, tiny_teacher

TARGETS: dict[str, Any] = {
    "logits": {"kind": "head+sketch", "k": 6, "rank": 8, "calibration_positions": 200},
    "hidden": {"layers": [1]},
}
TEXTS = sentences(44)
FIRST, SECOND = TEXTS[:28], TEXTS[20:]  # eight texts are in both
SMALL = {"unit_rows": 60, "positions_per_batch": 256, "threads_per_actor": 1}


def halves(folder: Path) -> tuple[Path, Path]:
    """Two caches at `folder`."""
    teacher = tiny_teacher(folder / "teacher")
    first = tiny_cache(folder / "first", teacher=teacher, texts=FIRST, targets=TARGETS, precompute=SMALL)
    given = {**TARGETS, "calibration_from": str(first)}
    return first, tiny_cache(folder / "second", teacher=teacher, texts=SECOND, targets=given, precompute=SMALL)


def rows_of(location: Path | str) -> dict[str, StoredRow]:
    """Every row of a cache, with all of its columns, by id; each id is there once."""
    cache = Cache.open(location)
    rows = [cache.read_row(split, index) for split in SPLITS for index in range(cache.rows_of(split))]
    by_id = {stored.row.row_id: stored for stored in rows}
    assert len(by_id) == len(rows)
    return by_id


def assert_same_row(one: StoredRow, other: StoredRow) -> None:
    assert (one.row.row_id, one.row.held_out, one.row.segments) == (
        other.row.row_id, other.row.held_out, other.row.segments,
    )  # fmt: skip
    np.testing.assert_array_equal(one.row.input_ids_S, other.row.input_ids_S)
    np.testing.assert_array_equal(one.row.target_mask_S, other.row.target_mask_S)
    assert one.targets.keys() == other.targets.keys()
    for name, values in one.targets.items():
        np.testing.assert_array_equal(values, other.targets[name])
