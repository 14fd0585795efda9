"""Finds the train rows of a cache that hold a document that another cache holds out.

A document is held out by the hash that names it, whoever made the cache (`tokens.rows.is_held_out`), so that source ids and a
share tell. Only the column of segments is decompressed, of every shard once; bytes are checked before as for
training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachercache.cache.files.entries import ShardInfo
from teachercache.cache.files.regular_files import path_of_open
from teachercache.cache.reader import Cache
from teachercache.cache.shards.one_column import batches_of_column, hashes_of
from teachercache.cache.shards.row_batch import offsets
from teachercache.cache.shards.shard import DAMAGE, damaged


def rows_beyond(cache: Cache, share: float) -> NDArray[np.int64]:
    """Numbers of the train rows none of whose documents is held out where `share` of all are; rising.

    Raises `CacheDamaged` for shards that do not say what their rows are of. Of a cache in an object store every shard's file of
    rows is fetched for it.
    """
    cache.prefetch(range(len(cache.infos)), columns=())
    kept, start = [np.zeros(0, np.int64)], 0
    for info in cache.infos:
        train = info.rows - info.held_out_rows
        kept.append(start + np.flatnonzero(~_holds_any(cache, info, share)[:train]))
        start += train
    return np.concatenate(kept)


def _holds_any(cache: Cache, info: ShardInfo, share: float) -> NDArray[np.bool_]:
    """For each row of a shard, whether any of its segments is of a held-out document."""
    try:
        with cache.source.opened(info.rows_file) as stream, pa.memory_map(str(path_of_open(stream))) as file:
            batches = [_of_batch(segments, share) for segments in batches_of_column(file, "segments", rows=info.rows)]
        return np.concatenate([np.empty(0, np.bool_), *batches])
    except DAMAGE as error:
        raise damaged(info.file, error) from None


def _of_batch(segments: Any, share: float) -> NDArray[np.bool_]:
    counts = np.diff(offsets(segments))
    if (counts < 1).any():
        raise ValueError("a row has no segment")
    hashes = np.frombuffer(hashes_of(segments.flatten().field("source_id")), ">u8")[1::2]
    held_out = (
        hashes <= np.uint64(max(math.ceil(share * 2**64) - 1, 0)) if share > 0 else np.zeros(len(hashes), np.bool_)
    )
    return np.logical_or.reduceat(held_out, np.cumsum(counts) - counts) if len(counts) else np.empty(0, np.bool_)
