"""Payload columns: per-position arrays and their bytes on disk.

A column holds, for every position of a row, an array of a fixed shape and type. On disk it is one binary value per row;
its codec stands in the schema metadata, so that any reader of Arrow can decode it:

    plain/1   little-endian elements in C order, [positions, *shape]
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged

PLAIN = "plain/1"


@dataclass(frozen=True)
class Column:
    """A payload column: `dtype` is a numpy code with byte order (`<f2`), `shape` that of one position."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    codec: str = PLAIN

    @property
    def position_bytes(self) -> int:
        """Bytes of one position before Arrow's compression."""
        return np.dtype(self.dtype).itemsize * prod(self.shape)

    def encode(self, values_N: NDArray[Any]) -> bytes:
        """Array [positions, *shape] to bytes."""
        if values_N.shape[1:] != self.shape:
            raise ValueError(f"column {self.name}: shape {values_N.shape} does not end in {self.shape}")
        return np.ascontiguousarray(values_N, dtype=self.dtype).tobytes()

    def decode(self, data: Any, *, positions: int) -> NDArray[Any]:
        """Bytes-like to a read-only array [positions, *shape] that shares their memory."""
        if memoryview(data).nbytes != positions * self.position_bytes:
            raise CacheDamaged(
                f"column {self.name}: {memoryview(data).nbytes} bytes for {positions} positions of {self.position_bytes} bytes"
            )
        return np.frombuffer(data, dtype=self.dtype).reshape(positions, *self.shape)

    def to_metadata(self) -> dict[str, Any]:
        """What the schema says about this column."""
        return {"codec": self.codec, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_metadata(cls, name: str, metadata: dict[str, Any]) -> Column:
        """Inverse of `to_metadata`; refuses codecs of a later version."""
        if metadata["codec"] != PLAIN:
            raise CacheDamaged(f"column {name} is coded as {metadata['codec']!r}; this version reads {PLAIN}")
        return cls(name, metadata["dtype"], tuple(metadata["shape"]))
