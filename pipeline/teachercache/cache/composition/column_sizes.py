"""Sizes of the columns of an Arrow file that is there, from what it says of its buffers: nothing is decompressed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa

from teachercache.cache.files.schema import shard_metadata
from teachercache.cache.shards.ipc_blocks import Blocks
from teachercache.cache.shards.shard import DAMAGE, damaged

LENGTH_BYTES = 8  # before each compressed buffer


def column_sizes(path: Path, *, name: str) -> dict[str, int]:
    """Compressed bytes of each column of a shard's file, tables in the schema included, as `write_shard` counts them. Raises
    `CacheDamaged`, which calls the file `name`."""
    try:
        with pa.memory_map(str(path)) as file:
            blocks = Blocks(file.read_buffer())
            file.seek(0)
            schema = pa.ipc.open_file(file).schema
            described = shard_metadata(schema)["columns"]
            sizes = Counter({field: 2 * len(described.get(field, {}).get("tables", "")) for field in schema.names})
            for number in range(len(blocks)):
                buffers = [max(0, size - LENGTH_BYTES) for size in blocks.buffer_bytes(number).tolist()]
                first = 0
                for field in schema:
                    count = _buffers_of(field.type)
                    sizes[field.name] += sum(buffers[first : first + count])
                    first += count
                if first != len(buffers):
                    raise ValueError("its record batches have other buffers than its columns need")
            return dict(sizes)
    except DAMAGE as error:
        raise damaged(name, error) from None


def _buffers_of(dtype: pa.DataType) -> int:
    """Counts the buffers that Arrow keeps of a column: validity, offsets or values, and those of what it nests."""
    own = 3 if pa.types.is_string(dtype) or pa.types.is_binary(dtype) else 1 if pa.types.is_struct(dtype) else 2
    return own + sum(_buffers_of(dtype.field(index).type) for index in range(dtype.num_fields))
