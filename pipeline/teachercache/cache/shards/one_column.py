"""One column of a shard's file, without a look at any other: its batches, bounded, and hashes in it as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from teachercache.cache.files.bounds import MOST_BATCH_BYTES
from teachercache.cache.shards.ipc_blocks import Blocks
from teachercache.cache.shards.row_batch import offsets

ID_DIGITS = 32  # hexadecimal, of the hash that names a row or a document
_HEX = b"0123456789abcdef"


def batches_of_column(file: pa.MemoryMappedFile, name: str) -> Iterator[pa.Array]:
    """The values of a column, a record batch at a time; only they are decompressed.

    Raises `ValueError`, or what pyarrow raises, for a file without the column, a batch that claims too much, or damage.
    """
    file.seek(0)
    blocks = Blocks(file.read_buffer())
    file.seek(0)
    field = pa.ipc.open_file(file).schema.get_field_index(name)
    if field < 0:
        raise ValueError(f"it has no column {name}")
    file.seek(0)
    reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=[field], use_threads=False))
    for number in range(len(blocks)):
        claimed = blocks.decompressed_bytes(number)
        if claimed > MOST_BATCH_BYTES:
            raise ValueError(f"record batch {number} claims {claimed} bytes, at most {MOST_BATCH_BYTES} are possible")
        [column] = reader.get_batch(number).columns
        column.validate(full=True)
        yield column


def hashes_of(column: Any) -> bytes:
    """Hashes that stand in a column as text, 16 bytes each, in their order. Raises `ValueError` where one is none."""
    if not pa.types.is_string(column.type):
        raise ValueError("it names rows or documents by something else than hashes")
    ends = offsets(column)
    digits = column.buffers()[2].slice(int(ends[0]), int(ends[-1] - ends[0])).to_pybytes() if len(column) else b""
    if (np.diff(ends) != ID_DIGITS).any() or digits.translate(None, _HEX):
        raise ValueError("it names rows or documents by something else than hashes")
    return bytes.fromhex(digits.decode("ascii"))
