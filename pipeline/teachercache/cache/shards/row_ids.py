"""The ids of the rows of a shard's file: 16 bytes each, as `row_ids` in an index covers them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import pyarrow as pa

from teachercache.cache.shards.ipc_blocks import Blocks
from teachercache.cache.shards.one_column import batches_of_columns, hashes_of


def row_ids_digest(ids: Iterable[str]) -> str:
    """sha256 over the ids of rows, 16 bytes each, in their order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, ids))).hexdigest()


def digest_of_ids(ids: Iterable[bytes]) -> str:
    """The same over ids that `row_ids_of` gives."""
    digest = hashlib.sha256()
    for part in ids:
        digest.update(part)
    return digest.hexdigest()


def row_ids_of(
    file: pa.MemoryMappedFile, *, rows: int, schema: pa.Schema | None = None, blocks: Blocks | None = None
) -> Iterator[bytes]:
    """The ids of the `rows` rows of an Arrow file, in their order, 16 bytes each, those of a record batch at a time. Raises as
    `batches_of_columns` and `hashes_of`."""
    batches = batches_of_columns(file, ["row_id"], rows=rows, schema=schema, blocks=blocks)
    return (hashes_of(column) for [column] in batches)


def check_same_rows(digest: str, row_ids: str) -> None:
    """Raise `ValueError` where the digest of a file's rows is another one than `row_ids` ("": of a format that told none)."""
    if row_ids and digest != row_ids:
        raise ValueError("it holds other rows than row_ids in the index says, or in another order")
