"""A record batch in memory, and its rows by index.

Numbers are read off Arrow's buffers as numpy arrays, once a batch: a scalar of Arrow's for each value of each row costs more
than the row, and its `to_numpy` imports pandas, where that is installed, which costs the first batch 0.4 s.

Source: "Arrow Columnar Format", on the buffers of primitive, boolean and variable-size layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def _segment(*, contents: Sequence[Mapping[str, Any]] = (), **fields: Any) -> Segment:
    """Shards of earlier caches have no contents."""
    return Segment(**fields, contents=tuple(Content(**content) for content in contents))


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

    def row(self, index: int) -> TokenRow:
        """Its arrays are copies; without segments in the batch it has none."""
        ends, ids, mask, held_out = self._tokens
        tokens = slice(ends[index], ends[index + 1])
        segments = self._batch.column("segments")[index].as_py() if "segments" in self._batch.schema.names else ()
        return TokenRow(
            row_id=str(self.payload("row_id", index), "utf-8"),
            held_out=bool(held_out[index]),
            input_ids_S=ids[tokens].copy(),
            target_mask_S=mask[tokens].copy(),
            segments=tuple(_segment(**segment) for segment in segments),
        )

    def payload(self, name: str, index: int) -> memoryview:
        """The bytes of a row's value in a binary or text column; they share the batch's memory."""
        if name not in self._payload:
            column = self._batch.column(name)
            self._payload[name] = offsets(column), memoryview(column.buffers()[2] or b"")
        ends, data = self._payload[name]
        return data[ends[index] : ends[index + 1]]
