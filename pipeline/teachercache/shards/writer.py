"""One work unit to one shard: an Arrow IPC file, zstd, several record batches, written to a temp file and renamed.

A pure function of its rows: equal rows and targets give equal bytes, whoever writes them and when.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from teachercache.shards.manifest import ShardInfo, file_info
from teachercache.shards.schema import shard_schema, table_metadata, to_batch
from teachercache.targets.columns import Column
from teachercache.tokens.rows import TokenRow

# A row is read by decompressing its record batch: about 1 MiB keeps that near a millisecond and still compresses well.
BATCH_BYTES = 2**20  # of targets, or four times that of ids and text where few tokens have targets


def write_shard(
    folder: Path,
    name: str,
    *,
    rows: Sequence[TokenRow],
    payload: Sequence[Mapping[str, NDArray[Any]]],
    columns: Sequence[Column],
    fingerprint: str,
    read_by: Mapping[str, str] | None = None,
    within: str = "shards",
) -> tuple[ShardInfo, dict[str, int]]:
    """Write `rows` with their columns to `folder/within/name`, training rows first; returns its entry and the
    compressed bytes of each column.

    `payload[i]` holds the arrays of `rows[i]`; `read_by` names the files by which they are read (`READ_BY`). The file
    appears under its name only when it is whole.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index].held_out)
    rows, payload = [rows[index] for index in order], [payload[index] for index in order]
    encoded = {column.name: column.encode([arrays[column.name] for arrays in payload]) for column in columns}
    tables = {column_name: shared for column_name, (shared, _) in encoded.items()}
    pages = [encoded[column.name][1] for column in columns]
    rows_per_batch = _rows_per_batch(pages, rows)
    schema = shard_schema(
        columns, tables=tables, rows_per_batch=rows_per_batch, fingerprint=fingerprint, read_by=read_by or {}
    )
    column_bytes = dict.fromkeys(schema.names, 0)
    for column_name, shared in tables.items():  # the schema stands at both ends of the file
        column_bytes[column_name] = 2 * len(table_metadata(shared).get("tables", ""))
    path = folder / within / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{name}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, _open_writer(sink, schema) as writer:
        for start in range(0, len(rows), rows_per_batch):
            chosen = slice(start, start + rows_per_batch)
            batch = to_batch(rows[chosen], [column[chosen] for column in pages], schema)
            writer.write_batch(batch)
            for column in schema.names:
                column_bytes[column] += _compressed_bytes(batch.column(column))
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())  # the record that follows must not reach the disk before the shard does
    temporary.replace(path)
    return _describe(folder, path, rows), column_bytes


def _open_writer(sink: Any, schema: pa.Schema) -> pa.RecordBatchFileWriter:
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
    return pa.ipc.new_file(sink, schema, options=options)


def _rows_per_batch(pages: Sequence[Sequence[bytes]], rows: Sequence[TokenRow]) -> int:
    targets = sum(len(page) for column in pages for page in column)
    # Where few tokens have targets, ids and text outweigh them: readers bound what a batch takes (claims.py).
    tokens = sum(5 * row.length + sum(len(segment.text or "") for segment in row.segments) for row in rows)
    return max(1, min(len(rows), len(rows) * BATCH_BYTES // max(1, targets, tokens // 4)))


def _compressed_bytes(array: pa.Array) -> int:
    """What the array's buffers take under the shard's codec (Arrow does not tell)."""
    codec = pa.Codec("zstd", compression_level=3)
    return sum(len(codec.compress(buffer)) for buffer in array.buffers() if buffer is not None and buffer.size)


def _describe(folder: Path, path: Path, rows: Sequence[TokenRow]) -> ShardInfo:
    held_out = [row for row in rows if row.held_out]
    info = file_info(folder, path)
    return ShardInfo(
        file=info.file,
        bytes=info.bytes,
        sha256=info.sha256,
        rows=len(rows),
        held_out_rows=len(held_out),
        positions=sum(row.positions for row in rows),
        held_out_positions=sum(row.positions for row in held_out),
        tokens=sum(row.length for row in rows),
    )
