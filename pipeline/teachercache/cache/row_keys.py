"""The rows of a cache by what names them, for joining caches: 8 MB for a million rows, which take three seconds to read
(tests/bench/join_rows.py).

Only the column of ids is decompressed, and bytes are not compared with their digests, which would mean to read all of a cache
for a few bytes of each row. That is safe for what it is for: a row that is found by its key is read as any other, its bytes
checked, and its whole id compared (`stream.ensemble_rows`), so that damage can hide a row and never bring a wrong one.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachercache.cache.files.entries import ShardInfo
from teachercache.cache.files.regular_files import path_of_open
from teachercache.cache.reader import Cache
from teachercache.cache.shards.row_ids import row_ids_of
from teachercache.cache.shards.shard import DAMAGE, damaged
from teachercache.cache.shards.shard_set import SPLITS, Split

Keys = NDArray[np.uint64]


def row_keys(cache: Cache) -> dict[Split, Keys]:
    """The first 64 bits of each row's id, by split, in the order of rows. Raises `CacheDamaged` for files that hold none.

    Of a cache in an object store every shard's file of rows is fetched for it, and checked.
    """
    cache.prefetch(range(len(cache.infos)), columns=())
    parts: dict[Split, list[Keys]] = {split: [] for split in SPLITS}
    for info in cache.infos:
        keys = _of_shard(cache, info)
        parts["train"].append(keys[: info.rows - info.held_out_rows])
        parts["held-out"].append(keys[info.rows - info.held_out_rows :])
    return {split: np.concatenate([np.empty(0, np.uint64), *keys]) for split, keys in parts.items()}


def _of_shard(cache: Cache, info: ShardInfo) -> Keys:
    try:
        with cache.source.unchecked(info.rows_file) as stream, pa.memory_map(str(path_of_open(stream))) as file:
            parts = [np.frombuffer(ids, ">u8")[::2].astype(np.uint64) for ids in row_ids_of(file, rows=info.rows)]
        return np.concatenate([np.empty(0, np.uint64), *parts])
    except DAMAGE as error:
        raise damaged(info.file, error) from None
