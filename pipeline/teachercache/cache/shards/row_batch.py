"""A record batch in memory, and its rows by index.

Numbers are read off Arrow's buffers as numpy arrays, once a batch: a scalar of Arrow's for each value of each row costs more
than the row, and its `to_numpy` imports pandas, where that is installed, which costs the first batch 0.4 s.

Source: "Arrow Columnar Format", on the buffers of primitive, boolean and variable-size layouts.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachercache.tokens.rows import Content, Segment, TokenRow


def numbers(array: pa.Array) -> NDArray[Any]:
    """An array of numbers or booleans without nulls as numpy's, without a copy where it is one of numbers."""
    data, start, stop = array.buffers()[1], array.offset, array.offset + len(array)
    if not len(array):
        return np.empty(0, np.dtype(str(array.type)))
    if pa.types.is_boolean(array.type):
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[start:stop].view(np.bool_)
    return np.frombuffer(data, np.dtype(str(array.type)))[start:stop]


def offsets(array: Any) -> NDArray[Any]:
    """Returns where each value of a list, binary or text array begins, and the last one ends: one more than it has
    values."""
    return np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]


class _Texts:
    """A text column; its values are made when they are asked for, None for one that is missing."""

    def __init__(self, column: Any) -> None:
        self._ends, self._data = offsets(column), memoryview(column.buffers()[2] or b"")
        self._held = numbers(column.is_valid()) if column.null_count else None

    def __getitem__(self, index: int) -> str | None:
        if self._held is not None and not self._held[index]:
            return None
        return str(self._data[self._ends[index] : self._ends[index + 1]], "utf-8")


class _Segments:
    """The segments of a batch, by row."""

    def __init__(self, lists: Any) -> None:
        fields = lists.values
        self._ends = offsets(lists).tolist()
        self._source_ids, self._texts = _Texts(fields.field("source_id")), _Texts(fields.field("text"))
        named = ("occurrence", "byte_start", "byte_end", "start")
        self._numbers = [numbers(fields.field(name)).tolist() for name in named]
        has_contents = fields.type.get_field_index("contents") >= 0  # shards of earlier caches have none
        self._contents = fields.field("contents") if has_contents and len(fields.field("contents").values) else None

    def row(self, index: int) -> tuple[Segment, ...]:
        """Those of a row."""
        return tuple(map(self._segment, range(self._ends[index], self._ends[index + 1])))

    def _segment(self, place: int) -> Segment:
        contents = () if self._contents is None else self._contents[place].as_py()
        source_id, text = self._source_ids[place], self._texts[place]
        assert source_id is not None
        occurrence, byte_start, byte_end, start = (values[place] for values in self._numbers)
        contents_of_segment = tuple(Content(**content) for content in contents)
        return Segment(source_id, occurrence, byte_start, byte_end, start, text, contents_of_segment)


class RowBatch:
    """Rows of a record batch that holds all of `ROW_COLUMNS`, or all but segments; its checks have run (row_checks.py)."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._payload: dict[str, tuple[NDArray[Any], memoryview]] = {}

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return int(self._batch.nbytes)

    @cached_property
    def _tokens(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Ends of rows, ids, target mask, and which rows are held out."""
        ids, mask, held_out = (self._batch.column(name) for name in ("input_ids", "target_mask", "held_out"))
        return offsets(ids), numbers(ids.values), numbers(mask.values), numbers(held_out)

    @cached_property
    def _segments(self) -> _Segments | None:
        return _Segments(self._batch.column("segments")) if "segments" in self._batch.schema.names else None

    def row(self, index: int) -> TokenRow:
        """Its arrays are copies; without segments in the batch it has none."""
        ends, ids, mask, held_out = self._tokens
        tokens = slice(ends[index], ends[index + 1])
        return TokenRow(
            row_id=str(self.payload("row_id", index), "utf-8"),
            held_out=bool(held_out[index]),
            input_ids_S=ids[tokens].copy(),
            target_mask_S=mask[tokens].copy(),
            segments=() if self._segments is None else self._segments.row(index),
        )

    def payload(self, name: str, index: int) -> memoryview:
        """The bytes of a row's value in a binary or text column; they share the batch's memory."""
        if name not in self._payload:
            column = self._batch.column(name)
            self._payload[name] = offsets(column), memoryview(column.buffers()[2] or b"")
        ends, data = self._payload[name]
        return data[ends[index] : ends[index + 1]]
