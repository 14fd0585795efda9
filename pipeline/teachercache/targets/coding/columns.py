"""Payload columns: per-position arrays and their bytes on disk.

A column holds, for every position of a row (or every block of `every` positions, every token, or every pair of a token and one
of its segment that is not after it), an array of a fixed shape and type. On disk it is one binary value per row; its codec
stands in the schema metadata, so that any reader of Arrow can decode it:

    plain/1   little-endian elements in C order, [positions, *shape]
    pco/1     integers, entropy-coded: see pco.py; its tables stand in the schema metadata, once a shard

What is read is not trusted: an element outside what its kind can have written is damage, as is a row that claims more
memory than any has.

A *ragged* column has as many entries as its row needs, position after position without padding; another column says how
many belong to each (ragged.py). Under `pco/1` their number stands before a row's pages, as a uint32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged
from teachercache.targets.coding import pco

PLAIN = "plain/1"
CODECS = (PLAIN, pco.NAME)

DTYPES = ("|u1", "<i2", "<u2", "<i4", "<u4", "<f2", "<f4")
LOG_SHARE = (-math.inf, 0.01)  # what log-probabilities, and logits less the largest, lie within; rounding is let pass
MOST_ROW_BYTES = 2**30  # of a row, all of its columns decoded: 32,768 hidden states of 8,192 channels

Decoder = Callable[[Any, int], NDArray[Any]]  # (bytes-like, positions) -> array [entries, *shape]


@dataclass(frozen=True)
class Column:
    """A payload column: `dtype` is a numpy code with byte order (`<f2`), `shape` that of one entry.

    `of` says what an entry belongs to. `groups` cuts the elements of an entry into runs that are coded with a table of their
    own (`pco/1` alone). The kind knows what the schema does not say: every element lies `within` these (a lower bound of
    -inf lets -inf pass, NaN never passes), and a ragged column has at most `most` entries a position.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    codec: str = PLAIN
    every: int = 1
    groups: tuple[int, ...] = ()
    ragged: bool = False
    of: Literal["position", "token", "pair"] = "position"
    within: tuple[float, float] | None = None
    most: int | None = None

    @property
    def position_bytes(self) -> float:
        """Bytes of one position before any compression."""
        return np.dtype(self.dtype).itemsize * self.width / self.every

    @property
    def width(self) -> int:
        """Elements of one entry."""
        return prod(self.shape)

    def entries(self, positions: int) -> int:
        """Returns the number of entries of a row of so many positions."""
        return ceil(positions / self.every)

    def decoded_bytes(self, data: Any, positions: int) -> int:
        """Returns the bytes that the array of a row with so many positions takes, as `data`, its bytes, claim; nothing
        is decoded. Raises `CacheDamaged` where a ragged column claims more entries than its positions have."""
        held, entries = memoryview(data).nbytes, self.entries(positions)
        if self.codec == PLAIN:
            return held
        if self.ragged:
            entries = struct.unpack_from("<I", data)[0] if held >= 4 else 0
            self._check_entries(entries, positions)
        return entries * self.width * np.dtype(self.dtype).itemsize

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
        """Returns the function that turns the bytes of a row into a read-only array; it raises `CacheDamaged` for bytes
        that do not fit."""
        return self._decode_plain if self.codec == PLAIN else self._pco_decoder(tables)

    def _decode_plain(self, data: Any, positions: int) -> NDArray[Any]:
        """Shares the memory of `data`."""
        held, entry_bytes = memoryview(data).nbytes, self.width * np.dtype(self.dtype).itemsize
        entries = held // max(1, entry_bytes) if self.ragged else self.entries(positions)
        if held != entries * entry_bytes:
            raise CacheDamaged(
                f"column {self.name}: {held} bytes for {positions} {self.of}s of {self.position_bytes:g} bytes"
            )
        self._check_entries(entries, positions)
        return self._checked(np.frombuffer(data, dtype=self.dtype).reshape(entries, *self.shape))

    def _pco_decoder(self, tables: bytes) -> Decoder:
        decoder = pco.Decoder(tables, self.groups, self.dtype, name=self.name)

        def decode(data: Any, positions: int) -> NDArray[Any]:
            pages, entries = memoryview(data), self.entries(positions)
            if self.ragged:
                if len(pages) < 4:
                    raise CacheDamaged(f"column {self.name}: a row does not say how many entries it has")
                (entries,), pages = struct.unpack_from("<I", pages), pages[4:]
            self._check_entries(entries, positions)
            return self._checked(decoder.decode(pages, entries).reshape(entries, *self.shape))

        return decode

    def _check_entries(self, entries: int, positions: int) -> None:
        """Checks a ragged column's entries before room is made for them; the bytes of a row are checked by
        `check_row_bytes`."""
        if self.ragged and self.most is not None and entries > positions * self.most:
            raise CacheDamaged(
                f"column {self.name}: {entries} entries for {positions} positions of at most {self.most}"
            )

    def _checked(self, values: NDArray[Any]) -> NDArray[Any]:
        if self.within is None or values.size == 0:
            return values
        least, largest = self.within
        if np.dtype(self.dtype).kind == "f":
            sound = _floats_up_to(values, largest)
        else:
            limits = np.iinfo(self.dtype)
            sound = (largest >= limits.max or values.max() <= largest) and (
                least <= limits.min or values.min() >= least
            )
        if not sound:
            raise CacheDamaged(
                f"column {self.name}: values from {values.min()} to {values.max()}, where {least:g} to {largest:g} are possible"
            )
        return values

    def to_metadata(self) -> dict[str, Any]:
        """Returns the schema's entry for this column, its tables apart."""
        metadata: dict[str, Any] = {"codec": self.codec, "dtype": self.dtype, "shape": list(self.shape)}
        if self.every != 1:
            metadata["every"] = self.every
        if self.groups:
            metadata["groups"] = list(self.groups)
        if self.ragged:
            metadata["ragged"] = True
        if self.of != "position":
            metadata["of"] = self.of
        return metadata

    @classmethod
    def from_metadata(cls, name: str, metadata: Any) -> Column:
        """Inverse of `to_metadata`; raises `CacheDamaged` for codecs of a later version, and for what describes no column."""
        try:
            codec, dtype, shape = metadata["codec"], metadata["dtype"], tuple(metadata["shape"])
            every, groups = metadata.get("every", 1), tuple(metadata.get("groups", ()))
            ragged, of = metadata.get("ragged", False), metadata.get("of", "position")
        except (KeyError, TypeError, AttributeError) as error:
            raise CacheDamaged(f"column {name} is not described as a column is ({error})") from None
        if codec not in CODECS:
            raise CacheDamaged(f"column {name} is coded as {codec!r}; this version reads {' and '.join(CODECS)}")
        whole = {type(number) for number in (every, *shape, *groups)} <= {int}
        if not (whole and every >= 1 and min((0, *shape)) >= 0 and min((1, *groups)) >= 1 and type(ragged) is bool):
            raise CacheDamaged(f"column {name} has sizes that none can have")
        if dtype not in DTYPES or (codec == pco.NAME and dtype not in pco.TYPES):
            raise CacheDamaged(f"column {name} has elements of type {dtype!r}, which {codec} does not hold")
        if of not in ("position", "token", "pair"):
            raise CacheDamaged(f"column {name} has an entry for every {of!r}, which no row has")
        column = cls(name, dtype, shape, codec, every, groups, ragged, of)
        if codec == pco.NAME and sum(groups) != column.width:
            raise CacheDamaged(f"column {name} has {column.width} elements in groups of {sum(groups)}")
        return column

    def read_as(self, stored: Column) -> Column:
        """This column of a kind, coded as a shard says that it is; raises `CacheDamaged` when the shard's is another one."""
        same = replace(self, codec=stored.codec, groups=stored.groups, within=None, most=None)
        if same != stored:
            raise CacheDamaged(f"column {self.name} is not of the type and shape that the manifest's settings ask for")
        return replace(self, codec=stored.codec, groups=stored.groups)


def _floats_up_to(values: NDArray[Any], largest: float) -> bool:
    """Tells whether no value is NaN or above `largest`, which is not negative. By their bits: numpy compares 16-bit
    floats one by one."""
    signed, unsigned, limit, minus_infinity = _bits(values.dtype.itemsize, largest)
    return bool(values.view(signed).max() <= limit and values.view(unsigned).max() <= minus_infinity)


def check_row_bytes(claims: Iterable[int], *, before: int = 0) -> int:
    """Adds up the bytes of a row whose columns claim so many bytes each, and `before` by others. Raises `CacheDamaged`
    for more than any row has, before room is made for them: a page of no bytes can stand for any number of zeros."""
    size = before + sum(claims)
    if size > MOST_ROW_BYTES:
        raise CacheDamaged(f"a row claims {size} bytes, at most {MOST_ROW_BYTES} are possible")
    return size


@lru_cache
def _bits(width: int, largest: float) -> tuple[np.dtype[Any], np.dtype[Any], int, int]:
    """Types of integers as wide as a float, the bits of `largest` as a signed one and of -inf as an unsigned one."""
    real, signed, unsigned = (np.dtype(f"<{code}{width}") for code in "fiu")
    bits = [int(np.array(value, real).view(kind)) for value, kind in ((largest, signed), (-np.inf, unsigned))]
    return signed, unsigned, bits[0], bits[1]
