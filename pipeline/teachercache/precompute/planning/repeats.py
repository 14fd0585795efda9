"""Rows whose content occurred before in the corpus, in whichever partition: an external sort by id.

Each partition's ids lie sorted on disk. They are merged by ranges of ids that hold about `BUCKET_ROWS` rows, apart from each
other: a range takes about 60 bytes of memory a row, and what comes back is of repeated rows alone.

Shapes: R repeated rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from teachercache.precompute.planning.each import Each
from teachercache.precompute.planning.row_table import ids_name
from teachercache.precompute.planning.shelf import Shelf

BUCKET_ROWS = 2**22
_IDS = 2**64  # of the first halves

Ints = NDArray[np.uint32]


@dataclass(frozen=True)
class Repeats:
    """Repeated rows by partition and row, in order; `rank_R` counts from 1: how often the content occurred before."""

    partition_R: Ints
    row_R: Ints
    rank_R: Ints

    def of(self, partition: int) -> tuple[Ints, Ints]:
        """Rows and ranks of a partition."""
        chosen = slice(*np.searchsorted(self.partition_R, np.array([partition, partition + 1], np.uint32)))
        return self.row_R[chosen], self.rank_R[chosen]

    def rank(self, partition: int, row: int) -> int:
        """The number of times that the content of a row occurred before."""
        return self.within(partition, row, row + 1).get(row, 0)

    def within(self, partition: int, first: int, stop: int) -> dict[int, int]:
        """Ranks of the repeated ones among some rows of a partition."""
        row_R, rank_R = self.of(partition)
        chosen = slice(*np.searchsorted(row_R, np.array([first, stop], np.uint32)))
        return dict(zip(row_R[chosen].tolist(), rank_R[chosen].tolist(), strict=True))


@dataclass(frozen=True)
class Bucket:
    """A range of ids, by their first halves, of all partitions whose tables are there."""

    tables: Shelf
    partitions: int
    first: int
    stop: int


def find_repeats(tables: Shelf, *, partitions: int, rows: int, each: Each, bucket_rows: int = BUCKET_ROWS) -> Repeats:
    """The repeated rows of all partitions, `rows` in all, whose tables are there."""
    count = max(1, -(-rows // bucket_rows))
    bounds = [number * _IDS // count for number in range(count + 1)]
    buckets = [Bucket(tables, partitions, first, stop) for first, stop in pairwise(bounds)]
    found = [*each(_repeats_in, buckets)]
    partition_R, row_R, rank_R = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order_R = np.lexsort((row_R, partition_R))
    return Repeats(partition_R[order_R], row_R[order_R], rank_R[order_R])


def _repeats_in(bucket: Bucket) -> tuple[Ints, Ints, Ints]:
    parts = [_ids_of(bucket, number) for number in range(bucket.partitions)]
    high_N, low_N, row_N = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    partition_N = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part[0]) for part in parts])
    order_N = np.argsort(high_N, kind="stable")
    sorted_N = high_N[order_N]
    shared_N = np.zeros(len(order_N), dtype=np.bool_)  # the first half of its id with a neighbour
    shared_N[1:] = sorted_N[1:] == sorted_N[:-1]
    shared_N[:-1] |= shared_N[1:].copy()
    order_N = order_N[shared_N]  # few, most often
    order_N = order_N[np.lexsort((low_N[order_N], high_N[order_N]))]
    rank_N = _ranks(high_N[order_N], low_N[order_N])
    repeated_R = order_N[rank_N > 0]
    return partition_N[repeated_R], row_N[repeated_R], rank_N[rank_N > 0]


def _ids_of(bucket: Bucket, number: int) -> Sequence[NDArray[np.uint64]]:
    ids = bucket.tables.read(ids_name(number))
    high_N = ids["high"].to_numpy()
    first, stop = (_below(high_N, bound) for bound in (bucket.first, bucket.stop))
    return [ids[name].to_numpy()[first:stop] for name in ("high", "low", "row")]


def _below(high_N: NDArray[np.uint64], bound: int) -> int:
    """Number of ids whose first half is below a bound."""
    return len(high_N) if bound == _IDS else int(np.searchsorted(high_N, np.uint64(bound)))


def _ranks(high_N: NDArray[np.uint64], low_N: NDArray[np.uint64]) -> Ints:
    """The number of equal ids before each, of ids in order."""
    begins_N = np.ones(len(high_N), dtype=np.bool_)
    begins_N[1:] = (high_N[1:] != high_N[:-1]) | (low_N[1:] != low_N[:-1])
    places_N = np.arange(len(high_N))
    ranks_N: Ints = (places_N - np.maximum.accumulate(np.where(begins_N, places_N, 0))).astype(np.uint32)
    return ranks_N
