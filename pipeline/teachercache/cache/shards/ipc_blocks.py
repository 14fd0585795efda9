"""Sizes that the record batches of an Arrow file claim, read before anything of them is decompressed.

Arrow makes room for a compressed buffer by the length that stands before its bytes, and decompresses whatever there is: a
few kilobytes of zstd can become gigabytes. So the lengths are added up first. They stand where the footer of the file and
the flatbuffers that describe each batch say; Arrow has no call for that, so the few fields are read here.

Source: "Arrow Columnar Format", IPC file format; FlatBuffers "Internals" for tables and vectors.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAGIC = b"ARROW1"
ID_BYTES = 16  # that a row takes at least: its id is a hash, which nothing makes smaller
BLOCK = np.dtype([("offset", "<i8"), ("metadata_bytes", "<i4"), ("", "<i4"), ("body_bytes", "<i8")])
BUFFER = np.dtype([("offset", "<i8"), ("bytes", "<i8")])
RECORD_BATCH = 3  # of the union `MessageHeader`


class Blocks:
    """The record batches of an Arrow file in memory (mapped). Raises `ValueError` for a file that is none."""

    def __init__(self, data: Any) -> None:
        self._data = memoryview(data)
        self._claimed: dict[int, int] = {}  # by number of the batch
        try:
            footer = _Table.root(self._footer())
            if len(footer.vector(2, BLOCK)):
                raise ValueError("it holds dictionaries, which no shard does")
            self._blocks = footer.vector(3, BLOCK)
            self._check_apart()
        except (struct.error, IndexError) as error:
            raise ValueError(f"its footer cannot be read ({error})") from None

    def _footer(self) -> memoryview:
        end = len(self._data) - len(MAGIC) - 4
        if end < 0 or bytes(self._data[end + 4 :]) != MAGIC:
            raise ValueError("it does not end as an Arrow file does")
        (size,) = struct.unpack_from("<i", self._data, end)
        if not 0 < size <= end:
            raise ValueError(f"its footer claims {size} bytes")
        return self._data[end - size : end]

    def __len__(self) -> int:
        return len(self._blocks)

    def _check_apart(self) -> None:
        """A footer may name one batch a thousand times, which is to be decompressed as often."""
        size = len(self._data)
        starts = np.clip(self._blocks["offset"], 0, size)
        ends = starts + self._blocks["metadata_bytes"] + np.clip(self._blocks["body_bytes"], 0, size)
        order = np.argsort(starts, kind="stable")
        if (ends[order[:-1]] > starts[order[1:]]).any():
            raise ValueError("its record batches lie over each other")

    def check_rows(self, rows: int) -> None:
        """Raise `ValueError` where its record batches do not say that they hold so many rows in all, or where the file is too
        small for them. Nothing is decompressed."""
        held = 0
        for number in range(len(self)):
            described = self._described(number)
            held += described.rows
            self._claimed[number] = _claimed(described)  # which is asked for next: what describes a batch is read once
            if described.rows < 1 or held > rows:
                break
        if held != rows or (rows and len(self) > rows):
            raise ValueError(f"it holds {'more' if held > rows else held} rows, the manifest says {rows}")
        if rows * ID_BYTES > len(self._data):
            raise ValueError(f"it claims {rows} rows, more than {len(self._data)} bytes can hold")

    def decompressed_bytes(self, number: int) -> int:
        """Returns the bytes that the buffers of a batch claim to take in memory."""
        if number not in self._claimed:
            self._claimed[number] = _claimed(self._described(number))
        return self._claimed[number]

    def buffer_bytes(self, number: int) -> NDArray[np.int64]:
        """Bytes of each buffer of a batch as it lies in the file, in the order of columns."""
        sizes: NDArray[np.int64] = self._described(number).buffers["bytes"].astype(np.int64)
        return sizes

    def _described(self, number: int) -> _Described:
        block = self._blocks[number]
        start, head, body_bytes = int(block["offset"]), int(block["metadata_bytes"]), int(block["body_bytes"])
        body = start + head
        if start < 0 or head < 8 or body_bytes < 0 or body + body_bytes > len(self._data):
            raise ValueError(f"record batch {number} lies outside the file")
        try:
            message = _Table.root(self._data[start + 8 : body])  # after 0xFFFFFFFF and the length
            if message.byte(1) != RECORD_BATCH:
                raise ValueError(f"block {number} is no record batch")
            described = message.table(2)
            rows, buffers, compressed = described.long(0), described.vector(2, BUFFER), described.has(3)
        except (struct.error, IndexError) as error:
            raise ValueError(f"record batch {number} cannot be read ({error})") from None
        return _Described(rows, self._data[body : body + body_bytes], buffers, compressed)


class _Described(NamedTuple):
    """A record batch as its flatbuffer says: its rows, its body, where its buffers lie in that, and whether they are
    compressed."""

    rows: int
    body: memoryview
    buffers: NDArray[Any]
    compressed: bool


def _claimed(described: _Described) -> int:
    body, buffers = described.body, described.buffers
    starts, sizes = buffers["offset"], buffers["bytes"]
    if len(buffers) and (buffers.view("<i8").min() < 0 or (starts > len(body) - sizes).any()):
        raise ValueError("a buffer lies outside its record batch")
    if not described.compressed:
        return int(sizes.sum())
    held = sizes > 0
    starts, sizes = starts[held], sizes[held]
    if len(sizes) and sizes.min() < 8:
        raise ValueError("a buffer does not say how long it is")
    claims = np.frombuffer(body, np.uint8)[starts[:, None] + np.arange(8)].view("<i8")[:, 0]
    if len(claims) and claims.min() < -1:
        raise ValueError("a buffer claims less than nothing")
    return sum(np.where(claims < 0, sizes, claims).tolist())  # -1: stored as it is


class _Table:
    """A table of a flatbuffer: fields by number."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - _unpack("<i", data, at)
        self._size = _unpack("<H", data, self._fields)

    @classmethod
    def root(cls, data: memoryview) -> _Table:
        return cls(data, _unpack("<I", data, 0))

    def has(self, field: int) -> bool:
        return self._offset(field) != 0

    def byte(self, field: int) -> int:
        offset = self._offset(field)
        return _unpack("<B", self._data, self._at + offset) if offset else 0

    def long(self, field: int) -> int:
        offset = self._offset(field)
        return _unpack("<q", self._data, self._at + offset) if offset else 0

    def table(self, field: int) -> _Table:
        return _Table(self._data, self._target(field))

    def vector(self, field: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Entries of a vector of structs; none where the field is absent."""
        if not self.has(field):
            return np.empty(0, dtype)
        start = self._target(field)
        count = _unpack("<I", self._data, start)
        if start + 4 + count * dtype.itemsize > len(self._data):
            raise IndexError("a vector ends beyond its buffer")
        return np.frombuffer(self._data, dtype, count, start + 4)

    def _offset(self, field: int) -> int:
        place = 4 + 2 * field
        return _unpack("<H", self._data, self._fields + place) if place + 2 <= self._size else 0

    def _target(self, field: int) -> int:
        offset = self._offset(field)
        if not offset:
            raise IndexError(f"field {field} is missing")
        return self._at + offset + _unpack("<I", self._data, self._at + offset)


def _unpack(code: str, data: memoryview, at: int) -> int:
    if at < 0:  # struct would count from the end
        raise IndexError("an offset is negative")
    return int(struct.unpack_from(code, data, at)[0])
