"""Single columns of a shard's file, without a look at any other: their batches, bounded, and hashes in one as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from teachercache.cache.files.bounds import MOST_BATCH_BYTES
from teachercache.cache.shards.ipc_blocks import Blocks
from teachercache.cache.shards.row_batch import offsets

ID_DIGITS = 32  # hexadecimal, of the hash that names a row or a document
IDS_AT_ONCE = 2**15  # so that the steps from text to bytes take no more memory than the ids
_HEX = b"0123456789abcdef"


def batches_of_column(file: pa.MemoryMappedFile, name: str, *, rows: int) -> Iterator[pa.Array]:
    """The values of a column, a record batch at a time. Raises as `batches_of_columns`."""
    return (column for [column] in batches_of_columns(file, [name], rows=rows))


def batches_of_columns(
    file: pa.MemoryMappedFile,
    names: Sequence[str],
    *,
    rows: int,
    schema: pa.Schema | None = None,
    blocks: Blocks | None = None,
) -> Iterator[list[pa.Array]]:
    """The values of some columns, in the order in which the file has them, a record batch at a time; only they are
    decompressed. `rows` is how many the file has to hold, which is seen before any is decompressed. `schema` and `blocks` are
    those of the file, where they were read before.

    Raises `ValueError`, or what pyarrow raises, for a file without the columns or with other rows, a batch that claims too
    much, or damage.
    """
    if blocks is None:
        file.seek(0)
        blocks = Blocks(file.read_buffer())
    blocks.check_rows(rows)
    reader = _reader(file, names, schema)
    for number in range(len(blocks)):
        claimed = blocks.decompressed_bytes(number)
        if claimed > MOST_BATCH_BYTES:
            raise ValueError(f"record batch {number} claims {claimed} bytes, at most {MOST_BATCH_BYTES} are possible")
        columns = reader.get_batch(number).columns
        for column in columns:
            column.validate(full=True)
        yield columns


def _reader(file: pa.MemoryMappedFile, names: Sequence[str], schema: pa.Schema | None) -> pa.RecordBatchFileReader:
    if schema is None:
        file.seek(0)
        schema = pa.ipc.open_file(file).schema
    fields = [schema.get_field_index(name) for name in names]
    if min(fields) < 0:
        raise ValueError(f"it has no column {names[fields.index(-1)]}")
    file.seek(0)
    return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False))


def hashes_of(column: Any) -> bytes:
    """Hashes that stand in a column as text, 16 bytes each, in their order. Raises `ValueError` where one is none."""
    if not pa.types.is_string(column.type):
        raise ValueError("it names rows or documents by something else than hashes")
    ends = offsets(column)
    if (np.diff(ends) != ID_DIGITS).any():
        raise ValueError("it names rows or documents by something else than hashes")
    if not len(column):
        return b""
    digits, step = memoryview(column.buffers()[2])[int(ends[0]) : int(ends[-1])], ID_DIGITS * IDS_AT_ONCE
    return b"".join(_bytes_of(bytes(digits[start : start + step])) for start in range(0, len(digits), step))


def _bytes_of(digits: bytes) -> bytes:
    if digits.translate(None, _HEX):
        raise ValueError("it names rows or documents by something else than hashes")
    return bytes.fromhex(digits.decode("ascii"))
