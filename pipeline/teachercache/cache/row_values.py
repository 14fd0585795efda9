"""Do the rows of a cache make sense? Every row is read as training reads it, with all of its columns, and by its alignments.

Bytes that are those that somebody wrote may still say what cannot be: the digests of a forged cache are right. Readers refuse
such rows when they meet them; who wants to know before, asks for all of them here.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path

from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.problem import Problem
from teachercache.cache.reader import Cache
from teachercache.cache.shards.shard_set import SPLITS, Split
from teachercache.errors import CacheDamaged

REMEDY = "precompute the cache again, or ask who made it"
ROWS_AT_ONCE = 256  # that a worker is given

CheckedRow = tuple[bytes | None, str | None]  # its row id, where it can be read, and what is wrong with it


def wrong_rows(
    location: str | Path, *, workers: int = 1, on_checked: Callable[[int], None] = lambda rows: None
) -> Iterator[Problem]:
    """Checks the values of all rows of a cache in a folder or at a URL, in `workers` processes; yields a problem for each
    row or file that cannot be read, in the order of rows.

    Takes 40 bytes of memory a row, for the ids that were seen. `on_checked` is told the number of rows that are done.
    """
    rows = _Rows(location)
    try:
        rows.load()
    except CacheDamaged as error:
        yield Problem(rows.cache.name, str(error), REMEDY)
        return
    seen = set[bytes]()
    for (split, start, _), checked in _checked(rows, workers):
        for index, (key, reason) in enumerate(checked, start):
            if key in seen:
                reason = f"an earlier row has the same row_id, {key.hex()}" if key else reason
            if key is not None:
                seen.add(key)
            if reason is not None:
                yield Problem(f"row {split}:{index}", reason, REMEDY)
        on_checked(len(checked))


Span = tuple[Split, int, int]  # rows of a split from one index up to another


def _checked(rows: _Rows, workers: int) -> Iterator[tuple[Span, list[CheckedRow]]]:
    spans = rows.spans()
    if workers == 1:
        yield from ((span, rows.check(span)) for span in spans)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share this process's open files and locks
    with ProcessPoolExecutor(workers, context, initializer=_open, initargs=(rows.location,)) as pool:
        try:
            yield from zip(spans, pool.map(_check, spans), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


class _Rows:
    """All rows of a cache, and what they are read by."""

    def __init__(self, location: str | Path) -> None:
        self.location = location
        self.cache = Cache.open(location)

    @cached_property
    def alignments(self) -> list[CacheAlignment]:
        """The cache's, opened. Raises `CacheDamaged`."""
        return CacheAlignment.all_of(self.cache)

    def load(self) -> None:
        """Load the files that rows are read by. Raises `CacheDamaged`."""
        _ = self.cache.targets, self.cache.boundary
        for alignment in self.alignments:
            _ = alignment.vocabulary, alignment.begins_V

    def spans(self) -> list[Span]:
        """All rows, so many at a time as a worker is given."""
        return [
            (split, start, min(start + ROWS_AT_ONCE, count))
            for split in SPLITS
            for count in [self.cache.rows_of(split)]
            for start in range(0, count, ROWS_AT_ONCE)
        ]

    def check(self, span: Span) -> list[CheckedRow]:
        """Read these rows, and what alignments say of them."""
        split, start, stop = span
        return [self._check(split, index) for index in range(start, stop)]

    def _check(self, split: Split, index: int) -> CheckedRow:
        key = None
        try:
            row = self.cache.read_row(split, index)
            key = bytes.fromhex(row.row.row_id)
            for alignment in self.alignments:
                alignment.aligned_row(split, index, row)
        except (CacheDamaged, ValueError) as error:
            return key, str(error)
        return key, None


_opened: list[_Rows] = []  # of a worker process


def _open(location: str | Path) -> None:
    _opened.append(_Rows(location))


def _check(span: Span) -> list[CheckedRow]:
    return _opened[0].check(span)
