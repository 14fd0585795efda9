"""Codec `pco/1`: small integers under the entropy coder of `pcodec`, tables shared by a shard, a page for each row.

Elements of an entry differ in their spread: the first sketch coefficient fills six bits, the last is nearly always zero.
So the elements are cut into groups, and each has its own table, fitted to all rows of the shard. A row stays readable by
itself: its bytes are one page a group, one after the other, entries innermost. That comes near the entropy of
each element (tests/targets/coding/test_columns.py holds it to 6 %), which compressors of bytes do not.

Source: Loncaric et al., "Pcodec: better compression for numerical sequences", 2025; wrapped format of package `pcodec`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, wrapped

from teachercache.errors import CacheDamaged

NAME = "pco/1"
MOST_VALUES = 2**24  # that pcodec takes under one table
TYPES = {"<i2": "i16", "<u2": "u16", "<i4": "i32", "<u4": "u32"}


def encode(arrays: Sequence[NDArray[Any]], groups: Sequence[int]) -> tuple[bytes, list[bytes]]:
    """Arrays [entries, width] of several rows to the tables they share and one page sequence each.

    `groups` sums up to the width. Rows without an entry become empty bytes.
    """
    filled = [index for index, values in enumerate(arrays) if len(values)]
    compressor = wrapped.FileCompressor()
    header = compressor.write_header()
    tables = [struct.pack("<I", len(header)), header]
    pages: list[list[bytes]] = [[] for _ in arrays]
    widest = max(1, MOST_VALUES // max(1, sum(map(len, arrays))))
    for chosen in _slices(_pieces(groups, widest)) if filled else ():
        flat = np.concatenate([arrays[index][:, chosen].T.ravel() for index in filled])
        sizes = [arrays[index][:, chosen].size for index in filled]
        config = ChunkConfig(
            mode_spec=ModeSpec.classic(),
            delta_spec=DeltaSpec.no_op(),
            paging_spec=PagingSpec.exact_page_sizes(sizes),
        )
        chunk = compressor.chunk_compressor(flat, config)
        table = chunk.write_meta()
        tables += [struct.pack("<II", chosen.stop - chosen.start, len(table)), table]
        for page, index in enumerate(filled):
            pages[index].append(chunk.write_page(page))
    return b"".join(tables), [b"".join(row) for row in pages]


class Decoder:
    """Reads the pages of one shard's column. Raises `CacheDamaged` for tables or pages that are no such thing."""

    def __init__(self, tables: bytes, groups: Sequence[int], dtype: str, *, name: str) -> None:
        self._width, self._dtype, self._name = sum(groups), dtype, name
        try:
            header, chunks = _split(tables)
            opened, _ = wrapped.FileDecompressor.new(header)
            self._groups = tuple(width for width, _ in chunks)
            self._chunks = [opened.chunk_decompressor(table, TYPES[dtype])[0] for _, table in chunks]
        except (RuntimeError, ValueError, KeyError, struct.error, OverflowError) as error:
            raise CacheDamaged(f"column {name}: its tables cannot be read ({error})") from None
        if self._chunks and sum(self._groups) != self._width:
            raise CacheDamaged(f"column {name}: tables of {sum(self._groups)} elements for {self._width}")

    def decode(self, data: Any, entries: int) -> NDArray[Any]:
        """One row's bytes to [entries, width]."""
        values_WE = np.empty((self._width, entries), dtype=self._dtype)
        if entries == 0 or self._width == 0:
            self._check_end(data)
            return values_WE.T
        if not self._chunks:
            raise CacheDamaged(f"column {self._name}: a row of {entries} entries in a shard without tables")
        try:
            for chosen, chunk in zip(_slices(self._groups), self._chunks, strict=True):
                target = values_WE[chosen].reshape(-1)
                progress, used = chunk.read_page_into(bytes(data), target.size, target)
                if progress.n_processed != target.size:
                    raise ValueError("a page ends early")
                data = data[used:]
        except (RuntimeError, ValueError) as error:
            raise CacheDamaged(f"column {self._name}: a row cannot be decoded ({error})") from None
        self._check_end(data)
        return np.ascontiguousarray(values_WE.T)

    def _check_end(self, data: Any) -> None:
        if len(data):
            raise CacheDamaged(f"column {self._name}: {len(data)} bytes are left after a row's last page")


def _slices(groups: Iterable[int]) -> Iterator[slice]:
    start = 0
    for size in groups:
        yield slice(start, start + size)
        start += size


def _pieces(groups: Sequence[int], widest: int) -> Iterator[int]:
    """The groups, those that would hold too many values cut up."""
    for size in groups:
        while size > 0:
            yield min(size, widest)
            size -= widest


def _split(tables: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    """The header, and each group's width and table."""
    (size,) = struct.unpack_from("<I", tables)
    header, start = tables[4 : 4 + size], 4 + size
    chunks = []
    while start < len(tables):
        width, size = struct.unpack_from("<II", tables, start)
        chunks.append((width, tables[start + 8 : start + 8 + size]))
        start += 8 + size
    return header, chunks
