"""Do the rows of a cache make sense? Every row is read as training reads it, with all of its columns, and by its alignments.

Bytes that are those that somebody wrote may still say what cannot be: the digests of a forged cache are right. Readers refuse
such rows when they meet them; who wants to know before, asks for all of them here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.problem import Problem
from teachercache.cache.reader import Cache
from teachercache.cache.shards.shard_set import SPLITS, Split
from teachercache.errors import CacheDamaged

REMEDY = "precompute the cache again, or ask who made it"


def wrong_rows(location: str | Path) -> Iterator[Problem]:
    """Checks the values of all rows of a cache in a folder or at a URL; yields a problem for each row or file that
    cannot be read.

    Takes 40 bytes of memory a row, for the ids that were seen.
    """
    cache = Cache.open(location)
    try:
        alignments, seen = CacheAlignment.all_of(cache), set[bytes]()
        _load(cache, alignments)
    except CacheDamaged as error:
        yield Problem(cache.name, str(error), REMEDY)
        return
    for split in SPLITS:
        for index in range(cache.rows_of(split)):
            try:
                _check_row(cache, alignments, split, index, seen)
            except (CacheDamaged, ValueError) as error:
                yield Problem(f"row {split}:{index}", str(error), REMEDY)


def _load(cache: Cache, alignments: list[CacheAlignment]) -> None:
    """Loads the files that rows are read by."""
    _ = cache.targets, cache.boundary, [(alignment.vocabulary, alignment.begins_V) for alignment in alignments]


def _check_row(cache: Cache, alignments: list[CacheAlignment], split: Split, index: int, seen: set[bytes]) -> None:
    row = cache.read_row(split, index)
    key = bytes.fromhex(row.row.row_id)
    if key in seen:
        raise CacheDamaged(f"an earlier row has the same row_id, {row.row.row_id}")
    seen.add(key)
    for alignment in alignments:
        alignment.aligned_row(split, index, row)
