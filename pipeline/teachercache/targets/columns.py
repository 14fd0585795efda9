"""Payload columns: per-position arrays and their bytes on disk.

A column holds, for every position of a row (or every block of `every` positions), an array of a fixed shape and type. On
disk it is one binary value per row; its codec stands in the schema metadata, so that any reader of Arrow can decode it:

    plain/1   little-endian elements in C order, [positions, *shape]
    pco/1     integers, entropy-coded: see pco.py; its tables stand in the schema metadata, once a shard

A *ragged* column has as many entries as its row needs, position after position without padding; another column says how
many belong to each (ragged.py). Under `pco/1` their number stands before a row's pages, as a uint32.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged
from teachercache.targets import pco

PLAIN = "plain/1"
CODECS = (PLAIN, pco.NAME)

Decoder = Callable[[Any, int], NDArray[Any]]  # (bytes-like, positions) -> array [entries, *shape]


@dataclass(frozen=True)
class Column:
    """A payload column: `dtype` is a numpy code with byte order (`<f2`), `shape` that of one entry.

    `groups` cuts the elements of an entry into runs that are coded with a table of their own (`pco/1` alone).
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    codec: str = PLAIN
    every: int = 1
    groups: tuple[int, ...] = ()
    ragged: bool = False

    @property
    def position_bytes(self) -> float:
        """Bytes of one position before any compression."""
        return np.dtype(self.dtype).itemsize * self.width / self.every

    @property
    def width(self) -> int:
        """Elements of one entry."""
        return prod(self.shape)

    def entries(self, positions: int) -> int:
        """How many entries a row of so many positions has."""
        return ceil(positions / self.every)

    def encode(self, arrays: Sequence[NDArray[Any]]) -> tuple[bytes, list[bytes]]:
        """The column of several rows, each [entries, *shape]: tables that they share, and the bytes of each row."""
        for values_N in arrays:
            if values_N.shape[1:] != self.shape:
                raise ValueError(f"column {self.name}: shape {values_N.shape} does not end in {self.shape}")
        if self.codec == PLAIN:
            return b"", [np.ascontiguousarray(values_N, dtype=self.dtype).tobytes() for values_N in arrays]
        flat = [np.asarray(values_N, dtype=self.dtype).reshape(len(values_N), self.width) for values_N in arrays]
        tables, pages = pco.encode(flat, self.groups)
        if self.ragged:
            pages = [struct.pack("<I", len(values_N)) + page for values_N, page in zip(arrays, pages, strict=True)]
        return tables, pages

    def decoder(self, tables: bytes = b"") -> Decoder:
        """How the bytes of a row become a read-only array; raises `CacheDamaged` for bytes that do not fit."""
        return self._decode_plain if self.codec == PLAIN else self._pco_decoder(tables)

    def _decode_plain(self, data: Any, positions: int) -> NDArray[Any]:
        """Shares the memory of `data`."""
        held, entry_bytes = memoryview(data).nbytes, self.width * np.dtype(self.dtype).itemsize
        entries = held // entry_bytes if self.ragged else self.entries(positions)
        if held != entries * entry_bytes:
            raise CacheDamaged(
                f"column {self.name}: {held} bytes for {positions} positions of {self.position_bytes:g} bytes"
            )
        return np.frombuffer(data, dtype=self.dtype).reshape(entries, *self.shape)

    def _pco_decoder(self, tables: bytes) -> Decoder:
        decoder = pco.Decoder(tables, self.groups, self.dtype, name=self.name)

        def decode(data: Any, positions: int) -> NDArray[Any]:
            pages, entries = memoryview(data), self.entries(positions)
            if self.ragged:
                if len(pages) < 4:
                    raise CacheDamaged(f"column {self.name}: a row does not say how many entries it has")
                (entries,), pages = struct.unpack_from("<I", pages), pages[4:]
            return decoder.decode(pages, entries).reshape(entries, *self.shape)

        return decode

    def to_metadata(self) -> dict[str, Any]:
        """What the schema says about this column, its tables apart."""
        metadata: dict[str, Any] = {"codec": self.codec, "dtype": self.dtype, "shape": list(self.shape)}
        if self.every != 1:
            metadata["every"] = self.every
        if self.groups:
            metadata["groups"] = list(self.groups)
        if self.ragged:
            metadata["ragged"] = True
        return metadata

    @classmethod
    def from_metadata(cls, name: str, metadata: dict[str, Any]) -> Column:
        """Inverse of `to_metadata`; refuses codecs of a later version."""
        if metadata["codec"] not in CODECS:
            raise CacheDamaged(
                f"column {name} is coded as {metadata['codec']!r}; this version reads {' and '.join(CODECS)}"
            )
        groups, every = tuple(metadata.get("groups", ())), metadata.get("every", 1)
        shape, ragged = tuple(metadata["shape"]), metadata.get("ragged", False)
        return cls(name, metadata["dtype"], shape, metadata["codec"], every, groups, ragged)
