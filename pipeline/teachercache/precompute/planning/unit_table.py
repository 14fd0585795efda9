"""Units: runs of documents of one partition, in order, cut where they hold enough rows or bytes.

Shapes: N rows of a partition, K of them kept as documents, U units.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachercache.precompute.planning.repeats import Ints
from teachercache.precompute.planning.row_table import ids_name, rows_name
from teachercache.precompute.planning.shelf import Shelf

# Of a unit: its partition, its first row there, its rows with those that are dropped, its documents, the place of its first
# row, and a check sum of its documents' ids.
COLUMNS = ("partition", "first", "rows", "documents", "span", "passed", "byte", "check")


@dataclass(frozen=True)
class UnitSize:
    """A unit closes at so many documents, or bytes of them as lines of JSON."""

    rows: int
    bytes: int


@dataclass(frozen=True)
class Cutting:
    """A partition to cut, by its tables, with its repeated rows."""

    number: int
    tables: Shelf
    row_R: Ints
    rank_R: Ints
    deduplicate: bool
    size: UnitSize


@dataclass(frozen=True)
class Cut:
    """Units of a partition, in `COLUMNS`; `digest` covers id, occurrence and problem of its documents, in order."""

    units: NDArray[np.uint64]  # [8, U]
    duplicates: int
    digest: str


def cut_partition(work: Cutting) -> Cut:
    """The units of a partition, and what identifies its content."""
    ids, rows = work.tables.read(ids_name(work.number)), work.tables.read(rows_name(work.number))
    ids_N2 = np.empty((len(rows), 2), dtype=np.uint64)
    ids_N2[ids["row"].to_numpy()] = np.stack([ids["high"].to_numpy(), ids["low"].to_numpy()], axis=1)
    rank_N = np.zeros(len(rows), dtype=np.uint32)
    rank_N[work.row_R] = work.rank_R
    keep_N = np.ones(len(rows), dtype=np.bool_)
    if work.deduplicate:
        keep_N = (rank_N == 0) | rows["problem"].is_valid().to_numpy(zero_copy_only=False)
    kept_K = np.flatnonzero(keep_N)
    bytes_K = rows["bytes"].to_numpy()[kept_K].astype(np.int64) + _digits(rank_N[kept_K]) - 1
    bounds = unit_bounds(bytes_K, work.size)
    first_U = np.append(kept_K, len(rows))[bounds[:-1]]
    units = {
        "partition": np.full(len(first_U), work.number),
        "first": first_U,
        "rows": np.diff(np.append(first_U, len(rows))),
        "documents": np.diff(bounds),
        **{name: rows[name].to_numpy()[first_U] for name in ("span", "passed", "byte")},
        "check": np.add.reduceat(ids_N2[kept_K, 1], bounds[:-1]) if len(first_U) else np.zeros(0, np.uint64),
    }
    digest = _digest(ids_N2[kept_K], rank_N[kept_K], rows["problem"].take(pa.array(kept_K)))
    return Cut(np.stack([units[name].astype(np.uint64) for name in COLUMNS]), len(rows) - len(kept_K), digest)


def unit_bounds(bytes_K: NDArray[np.int64], size: UnitSize) -> NDArray[np.int64]:
    """The first document of each unit among documents of these sizes, and their end: a unit closes with what fills it."""
    ends_K = np.cumsum(bytes_K)
    bounds = [0]
    while (start := bounds[-1]) < len(bytes_K):
        before = int(ends_K[start - 1]) if start else 0
        filled = int(np.searchsorted(ends_K, before + size.bytes)) + 1
        bounds.append(min(start + size.rows, filled, len(bytes_K)))
    return np.array(bounds, dtype=np.int64)


def _digits(values: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Digits of numbers."""
    digits: NDArray[np.int64] = 1 + sum((values >= 10**power).astype(np.int64) for power in range(1, 10))
    return digits


def _digest(ids_K2: NDArray[np.uint64], rank_K: NDArray[np.uint32], problem_K: pa.StringArray) -> str:
    """sha256 over a line `ID OCCURRENCE PROBLEM` of each document."""
    digest = hashlib.sha256()
    hexes = ids_K2.astype(">u8").tobytes().hex()
    plain_K = (rank_K == 0) & ~problem_K.is_valid().to_numpy(zero_copy_only=False)
    place = 0
    for other in [*np.flatnonzero(~plain_K).tolist(), len(rank_K)]:
        digest.update(_plain_lines(hexes[32 * place : 32 * other]))
        if other < len(rank_K):
            line = f"{hexes[32 * other : 32 * other + 32]} {rank_K[other]} {problem_K[other].as_py()}\n"
            digest.update(line.encode())
        place = other + 1
    return digest.hexdigest()


def _plain_lines(hexes: str) -> bytes:
    """The lines of documents that occur for the first time and have no problem."""
    tail = np.frombuffer(b" 0 None\n", np.uint8)
    ids = np.frombuffer(hexes.encode(), np.uint8).reshape(-1, 32)
    return np.hstack([ids, np.broadcast_to(tail, (len(ids), len(tail)))]).tobytes()
