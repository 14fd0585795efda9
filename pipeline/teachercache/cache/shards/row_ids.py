"""The ids of the rows of a shard's file, read without anything else: 16 bytes each, as `row_ids` in an index covers them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from teachercache.cache.files.bounds import MOST_BATCH_BYTES
from teachercache.cache.shards.ipc_blocks import Blocks
from teachercache.cache.shards.row_batch import offsets

ID_DIGITS = 32
_HEX = b"0123456789abcdef"


def row_ids_digest(ids: Iterable[str]) -> str:
    """sha256 over the ids of rows, 16 bytes each, in their order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, ids))).hexdigest()


def row_ids_of(file: pa.MemoryMappedFile) -> bytes:
    """Of all rows of an Arrow file, in their order, 16 bytes each. Only their column is decompressed.

    Raises `ValueError`, or what pyarrow raises, for a file that names no rows.
    """
    file.seek(0)
    blocks = Blocks(file.read_buffer())
    file.seek(0)
    field = pa.ipc.open_file(file).schema.get_field_index("row_id")
    if field < 0:
        raise ValueError("it names no rows")
    file.seek(0)
    reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=[field], use_threads=False))
    return b"".join(_of_batch(reader, blocks, number) for number in range(len(blocks)))


def check_row_ids(file: pa.MemoryMappedFile, row_ids: str) -> None:
    """Raise `ValueError` for a file with other rows than those of the digest `row_ids` ("": of a format that told none)."""
    if row_ids and hashlib.sha256(row_ids_of(file)).hexdigest() != row_ids:
        raise ValueError("it holds other rows than row_ids in the index says, or in another order")


def _of_batch(reader: pa.RecordBatchFileReader, blocks: Blocks, number: int) -> bytes:
    claimed = blocks.decompressed_bytes(number)
    if claimed > MOST_BATCH_BYTES:
        raise ValueError(f"record batch {number} claims {claimed} bytes, at most {MOST_BATCH_BYTES} are possible")
    [column] = reader.get_batch(number).columns
    column.validate(full=True)
    if not pa.types.is_string(column.type):
        raise ValueError("its row ids are none")
    ends = offsets(column)
    digits = column.buffers()[2].slice(int(ends[0]), int(ends[-1] - ends[0])).to_pybytes() if len(column) else b""
    if (np.diff(ends) != ID_DIGITS).any() or digits.translate(None, _HEX):
        raise ValueError("its row ids are none")
    return bytes.fromhex(digits.decode("ascii"))
