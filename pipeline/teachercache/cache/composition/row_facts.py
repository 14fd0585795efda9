"""Facts of a shard's rows: ids, counts and documents, from the columns that hold them. Targets are not read.

Bytes are checked as for training before text is read; ids alone are held against the index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachercache.cache.composition.where import Where
from teachercache.cache.files.entries import ShardInfo
from teachercache.cache.files.regular_files import path_of_open
from teachercache.cache.files.schema import ROW_COLUMNS
from teachercache.cache.reader import Cache
from teachercache.cache.shards.one_column import batches_of_columns, hashes_of
from teachercache.cache.shards.row_batch import numbers, offsets
from teachercache.cache.shards.row_ids import check_same_rows, digest_of_ids, row_ids_of
from teachercache.cache.shards.shard import DAMAGE, damaged

COLUMN_OF: Mapping[str, str] = {
    "row_id": "row_id",
    "source_id": "segments",
    "source_ids": "segments",
    "segments": "segments",
    "draw": "segments",
    "split": "held_out",
    "positions": "positions",
    "tokens": "input_ids",
}
ID_BYTES = 16


def ids_of(cache: Cache, info: ShardInfo) -> NDArray[np.void]:
    """The ids of a shard's rows, 16 bytes each. Raises `CacheDamaged` where they are not those that the index says."""
    try:
        with cache.source.unchecked(info.rows_file) as stream, pa.memory_map(str(path_of_open(stream))) as file:
            ids = b"".join(row_ids_of(file, rows=info.rows))
        check_same_rows(digest_of_ids([ids]), info.row_ids)
        return np.frombuffer(ids, f"V{ID_BYTES}")
    except DAMAGE as error:
        raise damaged(info.file, error) from None


def chosen_rows(cache: Cache, info: ShardInfo, where: Where, *, source: str) -> NDArray[np.bool_]:
    """Marks the rows of a shard that an expression holds of; `source` names the corpus that they came from."""
    names = sorted({COLUMN_OF[name] for name in where.names if name in COLUMN_OF})
    if not names:
        return np.full(info.rows, where.holds({"source": source}), np.bool_)
    marks: list[bool] = []
    for columns in _columns(cache, info, names):
        facts = _facts(columns, where.names)
        facts["source"] = [source] * len(next(iter(columns.values())))
        used = [facts[name] for name in where.names]
        marks += [where.holds(dict(zip(where.names, values, strict=True))) for values in zip(*used, strict=True)]
    return np.array(marks, np.bool_)


def source_ids_of(cache: Cache, info: ShardInfo) -> NDArray[np.bytes_]:
    """The ids of the documents of a shard's rows, 16 bytes each."""
    parts = [
        hashes_of(columns["segments"].flatten().field("source_id")) for columns in _columns(cache, info, ["segments"])
    ]
    return np.frombuffer(b"".join(parts), f"S{ID_BYTES}")


@dataclass(frozen=True)
class Windows:
    """Counts of some rows: documents, windows of them, and documents with more than one window."""

    documents: int = 0
    windows: int = 0
    windowed: int = 0

    def __add__(self, other: Windows) -> Windows:
        return Windows(self.documents + other.documents, self.windows + other.windows, self.windowed + other.windowed)

    def __sub__(self, other: Windows) -> Windows:
        return Windows(self.documents - other.documents, self.windows - other.windows, self.windowed - other.windowed)


def windows_of(cache: Cache, info: ShardInfo, rows: NDArray[np.bool_] | None) -> tuple[Windows, Windows]:
    """Counts of the marked rows of a shard (None: all), and of all of them. All windows of a document are in one shard."""
    all_keys: list[tuple[str, int]] = []
    kept_keys: list[tuple[str, int]] = []
    first = 0
    for columns in _columns(cache, info, ["segments"]):
        segments = columns["segments"]
        counts = np.diff(offsets(segments))
        fields = segments.flatten()
        keys = list(
            zip(fields.field("source_id").to_pylist(), numbers(fields.field("occurrence")).tolist(), strict=True)
        )
        all_keys += keys
        if rows is not None:
            kept = np.repeat(rows[first : first + len(segments)], counts)
            kept_keys += [key for key, is_kept in zip(keys, kept.tolist(), strict=True) if is_kept]
        first += len(segments)
    whole = _counted(all_keys)
    return (whole if rows is None else _counted(kept_keys)), whole


def _counted(keys: Sequence[tuple[str, int]]) -> Windows:
    times: dict[tuple[str, int], int] = {}
    for key in keys:
        times[key] = times.get(key, 0) + 1
    return Windows(len(times), len(keys), sum(count > 1 for count in times.values()))


def _columns(cache: Cache, info: ShardInfo, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of a shard's rows, a record batch at a time."""
    try:
        with cache.source.opened(info.rows_file) as stream, pa.memory_map(str(path_of_open(stream))) as file:
            for columns in batches_of_columns(file, names, rows=info.rows):
                # Arrow gives them in the order of the file.
                yield dict(zip(sorted(names, key=ROW_COLUMNS.index), columns, strict=True))
    except DAMAGE as error:
        raise damaged(info.file, error) from None


def _facts(columns: Mapping[str, Any], names: frozenset[str]) -> dict[str, list[Any]]:
    facts: dict[str, list[Any]] = {}
    if "row_id" in columns:
        facts["row_id"] = columns["row_id"].to_pylist()
    if "held_out" in columns:
        facts["split"] = ["held-out" if held else "train" for held in numbers(columns["held_out"]).tolist()]
    if "positions" in columns:
        facts["positions"] = numbers(columns["positions"]).tolist()
    if "input_ids" in columns:
        facts["tokens"] = np.diff(offsets(columns["input_ids"])).tolist()
    if "segments" in columns:
        facts |= _documents(columns["segments"])
    return facts


def _documents(segments: Any) -> dict[str, list[Any]]:
    ends = (offsets(segments) - offsets(segments)[0]).tolist()
    ids = segments.flatten().field("source_id").to_pylist()
    by_row = [tuple(ids[start:end]) for start, end in pairwise(ends)]
    if not all(by_row):
        raise ValueError("a row has no segment")
    return {
        "source_ids": by_row,
        "source_id": [of_row[0] for of_row in by_row],
        "segments": [len(of_row) for of_row in by_row],
        "draw": [int(of_row[0][:16], 16) / 2**64 for of_row in by_row],
    }
