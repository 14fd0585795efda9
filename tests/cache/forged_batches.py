"""Shards whose record batches hold other rows than the manifest says: many times as many, or one batch again and again."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pyarrow as pa

from cache.forgery import sign
from teachercache.cache.shards.ipc_blocks import BLOCK, MAGIC

ROWS = 4_000_000  # of a batch, with ids that are all zeros: 128 MB, of which a file holds a few kB


def many_rows(folder: Path, *, batches: int = 12) -> None:
    """Batches of millions of rows in a shard of a few."""
    path = _first(folder)
    with pa.OSFile(str(path)) as source:
        schema = pa.ipc.open_file(source).schema
    batch = pa.RecordBatch.from_arrays([_zeros(field.type) for field in schema], schema=schema)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    sign(folder)


def _zeros(dtype: Any) -> Any:
    if pa.types.is_string(dtype):
        ends = pa.array(range(0, 32 * (ROWS + 1), 32), pa.int32())
        return pa.StringArray.from_buffers(ROWS, ends.buffers()[1], pa.py_buffer(b"0" * (32 * ROWS)))
    if pa.types.is_list(dtype):
        return pa.ListArray.from_arrays(pa.array([0], pa.int32()).take(_none(ROWS + 1)), pa.array([], dtype.value_type))
    one = pa.array([b""], dtype) if pa.types.is_binary(dtype) else pa.array([0], pa.int8()).cast(dtype)
    return one.take(_none(ROWS))


def _none(count: int) -> Any:
    return pa.Array.from_buffers(pa.int32(), count, [None, pa.py_buffer(bytes(4 * count))])


def one_batch_often(folder: Path, *, times: int = 400) -> None:
    """A footer that names the first record batch, one of millions of rows, many times."""
    many_rows(folder, batches=1)
    name_often(_first(folder), times=times)
    sign(folder)


def name_often(path: Path, *, times: int) -> None:
    """Write a file's footer anew: it names the first record batch so many times, and no other."""
    data = path.read_bytes()
    end = len(data) - len(MAGIC) - 4
    (size,) = struct.unpack_from("<i", data, end)
    footer = bytearray(data[end - size : end])
    field = _field(footer, 3)
    start = field + struct.unpack_from("<I", footer, field)[0]
    first = bytes(footer[start + 4 : start + 4 + BLOCK.itemsize])
    footer += bytes(-(len(footer) + 4) % 8)
    struct.pack_into("<I", footer, field, len(footer) - field)
    footer += struct.pack("<I", times) + first * times
    path.write_bytes(data[: end - size] + bytes(footer) + struct.pack("<i", len(footer)) + MAGIC)


def _field(footer: bytearray, number: int) -> int:
    (root,) = struct.unpack_from("<I", footer, 0)
    fields = root - struct.unpack_from("<i", footer, root)[0]
    (offset,) = struct.unpack_from("<H", footer, fields + 4 + 2 * number)
    return int(root + offset)


def _first(folder: Path) -> Path:
    [path] = (folder / "shards").glob("part-00000*")
    return path
