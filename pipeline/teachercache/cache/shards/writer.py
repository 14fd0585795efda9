"""One work unit to one shard: an Arrow IPC file for each column group, zstd, several record batches each.

A pure function of its rows: equal rows and targets give equal bytes, whoever writes them and when. A file's name holds the
beginning of its sha256. It is made in memory and then put whole: what two writers of one shard make never meets under one name,
and only the record of a finished unit says which of them counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from teachercache.cache.files.column_groups import Group
from teachercache.cache.files.entries import FileInfo, ShardInfo
from teachercache.cache.files.schema import file_schema, table_metadata, to_batch
from teachercache.cache.shards.row_ids import row_ids_digest
from teachercache.cache.stores.named import put_named
from teachercache.cache.stores.store import Store
from teachercache.tokens.rows import TokenRow

# A row is read by decompressing its record batch: about 1 MiB keeps that near a millisecond and still compresses well.
BATCH_BYTES = 2**20  # of a file's targets, or four times that of ids and text where few tokens have targets


def write_shard(
    store: Store,
    number: int,
    *,
    rows: Sequence[TokenRow],
    payload: Sequence[Mapping[str, NDArray[Any]]],
    groups: Sequence[Group],
) -> tuple[ShardInfo, dict[str, int]]:
    """Write `rows` with the columns of all `groups` to a cache in a store, training rows first; returns the shard's entry
    and the compressed bytes of each column.

    `payload[i]` holds the arrays of `rows[i]`. A file appears under its name only when it is whole.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index].held_out)
    rows, payload = [rows[index] for index in order], [payload[index] for index in order]
    column_bytes: Counter[str] = Counter()
    files = {}
    for group in groups:
        files[group.folder], sizes = _write_file(store, number, group, rows, payload)
        column_bytes.update(sizes)
    held_out = [row for row in rows if row.held_out]
    info = ShardInfo(
        rows=len(rows),
        held_out_rows=len(held_out),
        positions=sum(row.positions for row in rows),
        held_out_positions=sum(row.positions for row in held_out),
        tokens=sum(row.length for row in rows),
        row_ids=row_ids_digest(row.row_id for row in rows),
        files=files,
    )
    return info, dict(column_bytes)


def _write_file(
    store: Store,
    number: int,
    group: Group,
    rows: Sequence[TokenRow],
    payload: Sequence[Mapping[str, NDArray[Any]]],
) -> tuple[FileInfo, dict[str, int]]:
    encoded = {column.name: column.encode([arrays[column.name] for arrays in payload]) for column in group.columns}
    tables = {name: shared for name, (shared, _) in encoded.items()}
    pages = [encoded[column.name][1] for column in group.columns]
    rows_per_batch = _rows_per_batch(pages, rows if group.has_rows else ())
    rows_per_batch = max(1, min(len(rows), rows_per_batch))
    schema = file_schema(
        group.fields, group.columns, tables=tables, rows_per_batch=rows_per_batch, described=group.metadata()
    )
    column_bytes = dict.fromkeys(schema.names, 0)
    for name, shared in tables.items():  # the schema stands at both ends of the file
        column_bytes[name] = 2 * len(table_metadata(shared).get("tables", ""))
    sink = pa.BufferOutputStream()
    with _open_writer(sink, schema) as writer:
        for start in range(0, len(rows), rows_per_batch):
            chosen = slice(start, start + rows_per_batch)
            batch = to_batch(rows[chosen], [column[chosen] for column in pages], schema)
            writer.write_batch(batch)
            for name in schema.names:
                column_bytes[name] += _compressed_bytes(batch.column(name))
    return put_named(store, group.folder, f"part-{number:05d}", ".arrow", sink.getvalue()), column_bytes


def _open_writer(sink: Any, schema: pa.Schema) -> pa.RecordBatchFileWriter:
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
    return pa.ipc.new_file(sink, schema, options=options)


def _rows_per_batch(pages: Sequence[Sequence[bytes]], rows: Sequence[TokenRow]) -> int:
    targets = sum(len(page) for column in pages for page in column)
    # Where few tokens have targets, ids and text outweigh them: readers bound what a batch takes (row_checks.py).
    tokens = sum(5 * row.length + sum(len(segment.text or "") for segment in row.segments) for row in rows)
    count = len(rows) or max((len(column) for column in pages), default=0)
    return count * BATCH_BYTES // max(1, targets, tokens // 4)


def _compressed_bytes(array: pa.Array) -> int:
    """Returns the bytes of the array's buffers under the shard's codec (Arrow does not tell)."""
    codec = pa.Codec("zstd", compression_level=3)
    return sum(len(codec.compress(buffer)) for buffer in array.buffers() if buffer is not None and buffer.size)
