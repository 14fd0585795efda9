"""Columns of a shard's files, and rows to them (row_batch.py reads them).

Plain columns open in anything that reads Arrow; payload columns are binary, and the schema metadata names their codec.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from teachercache.bounded.strangers_json import parse_json
from teachercache.errors import CacheDamaged
from teachercache.targets.coding.columns import Column
from teachercache.tokens.rows import Segment, TokenRow

METADATA_KEY = b"teachercache"
MOST_METADATA_BYTES = 2**26  # of a file's; codecs keep a few KB a column there
MOST_METADATA_VALUES = 2**18

_SEGMENT = (
    pa.field("source_id", pa.string(), nullable=False),
    pa.field("occurrence", pa.int32(), nullable=False),
    pa.field("byte_start", pa.int64(), nullable=False),
    pa.field("byte_end", pa.int64(), nullable=False),
    pa.field("start", pa.int32(), nullable=False),
    pa.field("text", pa.string()),
)
_CONTENT = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("start", pa.int32(), nullable=False),
        pa.field("end", pa.int32(), nullable=False),
    ]
)
SEGMENT = pa.struct([*_SEGMENT, pa.field("contents", pa.list_(_CONTENT), nullable=False)])

ROW_FIELDS = (
    pa.field("row_id", pa.string(), nullable=False),
    pa.field("held_out", pa.bool_(), nullable=False),
    pa.field("positions", pa.int32(), nullable=False),
    pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("target_mask", pa.list_(pa.bool_()), nullable=False),
    pa.field("segments", pa.list_(SEGMENT), nullable=False),
)
ROW_COLUMNS = tuple(field.name for field in ROW_FIELDS)


def file_schema(
    fields: Sequence[pa.Field],
    columns: Sequence[Column],
    *,
    tables: Mapping[str, bytes],
    rows_per_batch: int,
    described: Mapping[str, Any],
) -> pa.Schema:
    """Schema of one file of a shard; its metadata says how payload columns are coded (`tables`: what codecs keep once a
    file) and, by `described`, what it belongs to (column_groups.py)."""
    payload = [pa.field(column.name, pa.binary(), nullable=False) for column in columns]
    metadata = {
        "rows_per_batch": rows_per_batch,
        "columns": {
            column.name: column.to_metadata() | table_metadata(tables.get(column.name, b"")) for column in columns
        },
        **described,
    }
    return pa.schema([*fields, *payload], metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def shard_metadata(schema: pa.Schema) -> dict[str, Any]:
    """Our metadata of a shard's schema; raises `CacheDamaged` when it is not a shard's."""
    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise CacheDamaged("it is an Arrow file, but no shard of teachercache")
    try:
        if len(raw) > MOST_METADATA_BYTES:
            raise ValueError
        metadata: dict[str, Any] = parse_json(raw, most=MOST_METADATA_VALUES)
        rows = metadata["rows_per_batch"]
        described = [metadata["columns"], metadata.get("targets", {}), metadata.get("read_by", {})]
        sound = type(rows) is int and rows >= 1 and all(type(section) is dict for section in described)
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise CacheDamaged("its metadata is not a shard's")
    return metadata


def check_schema(
    schema: pa.Schema, fields: Sequence[pa.Field], columns: Sequence[str], *, among_others: bool = False
) -> None:
    """Raise `CacheDamaged` unless a file has these fields, and the columns of its targets, in order and type; `among_others`
    allows for further columns, which only later versions know."""
    expected = [*(field.name for field in fields), *columns]
    names = [name for name in schema.names if name in expected] if among_others else schema.names
    if names != expected:
        raise CacheDamaged(
            f"its columns are {', '.join(schema.names)[:500]}; the manifest's settings ask for {', '.join(expected)}"
        )
    types = [*(field.type for field in fields), *(pa.binary() for _ in columns)]
    for name, wanted in zip(expected, types, strict=True):
        dtype = schema.field(name).type
        before_contents = name == "segments" and dtype.equals(pa.list_(pa.struct(_SEGMENT)))  # of earlier caches
        if not dtype.equals(wanted) and not before_contents:
            raise CacheDamaged(f"its column {name} is of type {str(dtype)[:200]}, not {wanted}")


def table_metadata(tables: bytes) -> dict[str, str]:
    """Tables as JSON holds them."""
    return {"tables": base64.b64encode(tables).decode()} if tables else {}


def tables_of(metadata: Mapping[str, Any]) -> bytes:
    """Inverse of `table_metadata`; raises `CacheDamaged` for what is no base64."""
    try:
        return base64.b64decode(metadata.get("tables", ""), validate=True)
    except (ValueError, TypeError) as error:
        raise CacheDamaged(f"tables of a column cannot be read ({error})") from None


def _segment(segment: Segment) -> dict[str, Any]:
    return {**vars(segment), "contents": [content._asdict() for content in segment.contents]}


_VALUE_OF: dict[str, Callable[[TokenRow], Any]] = {
    "row_id": lambda row: row.row_id,
    "held_out": lambda row: row.held_out,
    "positions": lambda row: row.positions,
    "input_ids": lambda row: row.input_ids_S,
    "target_mask": lambda row: row.target_mask_S,
    "segments": lambda row: [_segment(segment) for segment in row.segments],
}


def to_batch(rows: Sequence[TokenRow], payload: Sequence[Sequence[bytes]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows and the encoded bytes of each target column, `payload[column][row]`, as one record batch of a file that holds all
    columns of rows, or their ids alone."""
    of_rows = schema.names[: len(schema.names) - len(payload)]
    values = [*([_VALUE_OF[name](row) for row in rows] for name in of_rows), *(list(column) for column in payload)]
    arrays = [pa.array(value, type=field.type) for value, field in zip(values, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
