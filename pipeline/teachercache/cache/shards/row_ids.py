"""The ids of the rows of a shard's file: 16 bytes each, as `row_ids` in an index covers them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pyarrow as pa

from teachercache.cache.shards.one_column import batches_of_column, hashes_of


def row_ids_digest(ids: Iterable[str]) -> str:
    """sha256 over the ids of rows, 16 bytes each, in their order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, ids))).hexdigest()


def row_ids_of(file: pa.MemoryMappedFile) -> bytes:
    """The ids of all rows of an Arrow file, in their order, 16 bytes each. Raises as `batches_of_column` and `hashes_of`."""
    return b"".join(map(hashes_of, batches_of_column(file, "row_id")))


def check_row_ids(file: pa.MemoryMappedFile, row_ids: str) -> None:
    """Raise `ValueError` for a file with other rows than those of the digest `row_ids` ("": of a format that told none)."""
    if row_ids and hashlib.sha256(row_ids_of(file)).hexdigest() != row_ids:
        raise ValueError("it holds other rows than row_ids in the index says, or in another order")
