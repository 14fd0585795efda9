"""Decompressed record batches in memory: as many as fit, the ones used last, and never other rows because of it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from teachercache.cache import Cache
from teachercache.cache.shards.decompressed import Decompressed

from builders import sentences, tiny_cache


def batch(number: int, size: int = 1000) -> pa.RecordBatch:
    return pa.record_batch({"values": pa.array(np.full(size, number, dtype=np.int64))})


def test_what_fits_is_made_once():
    made = []

    def of(number: int) -> pa.RecordBatch:
        made.append(number)
        return batch(number)

    recent = Decompressed(3 * batch(0).nbytes)
    for number in (0, 1, 2, 0, 1, 2):
        assert recent.get(number, lambda number=number: of(number))["values"][0].as_py() == number
    assert made == [0, 1, 2] and recent.held_bytes == 3 * batch(0).nbytes
    recent.get(3, lambda: of(3))
    recent.get(1, lambda: of(1))
    assert made == [0, 1, 2, 3]  # 0 was used longest ago
    recent.get(0, lambda: of(0))
    assert made == [0, 1, 2, 3, 0] and recent.held_bytes == 3 * batch(0).nbytes


def test_a_batch_beyond_the_bound_is_held_alone():
    recent = Decompressed(10)
    for number in range(3):
        recent.get(number, lambda number=number: batch(number))
        assert recent.held_bytes == batch(0).nbytes


def test_rows_are_the_same_however_much_is_kept(tmp_path):
    folder = tiny_cache(tmp_path, texts=sentences(60), precompute={"unit_rows": 20})
    caches = [Cache.open(folder), Cache.open(folder)]
    caches[1].recent.most_bytes = 0
    names = [None, (), ("head_ids",)]
    for index in np.random.default_rng(0).integers(0, caches[0].rows_of("train"), size=80).tolist():
        for columns in names:
            kept, fresh = (cache.read_row("train", index, columns=columns) for cache in caches)
            assert kept.row.row_id == fresh.row.row_id
            np.testing.assert_array_equal(kept.row.input_ids_S, fresh.row.input_ids_S)
            assert kept.targets.keys() == fresh.targets.keys()
            for name, values in kept.targets.items():
                np.testing.assert_array_equal(values, fresh.targets[name])
    assert 0 < caches[1].recent.held_bytes < caches[0].recent.held_bytes
