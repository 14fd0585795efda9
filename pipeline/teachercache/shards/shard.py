"""One memory-mapped shard: rows by index, checked before they are handed out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged
from teachercache.shards.claims import MOST_BATCH_BYTES, check_rows
from teachercache.shards.decompressed import Decompressed
from teachercache.shards.ipc_blocks import Blocks
from teachercache.shards.manifest import ShardInfo
from teachercache.shards.row_batch import RowBatch
from teachercache.shards.schema import READ_BY, ROW_COLUMNS, check_schema, shard_metadata, tables_of
from teachercache.targets.columns import Column, Decoder
from teachercache.tokens.rows import TokenRow


class Payload(Protocol):
    """What rows hold beside their tokens: targets of a teacher, or the alignment with its tokens."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """In the order in which shards store them."""

    def check_stored(self, stored: Mapping[str, NDArray[Any]]) -> None:
        """Raise `CacheDamaged` where a row's columns, those that are there, cannot be."""


@dataclass(frozen=True, eq=False)
class StoredRow:
    """A row and its columns as they are stored; `decoded` of a kind in `Cache.targets` makes them arrays of a batch."""

    row: TokenRow
    targets: dict[str, NDArray[Any]]


class Shard:
    """One memory-mapped shard, whose bytes are checked by now, but not what they say: see claims.py.

    `payload` says which columns it must have, `longest` how many tokens a row may have. Everything raises `CacheDamaged`,
    naming file and remedy, for a shard that cannot be one of such a cache.
    """

    def __init__(
        self,
        file: pa.MemoryMappedFile,
        info: ShardInfo,
        *,
        fingerprint: str,
        payload: Payload,
        vocabulary_size: int,
        longest: int,
    ) -> None:
        self.info, self._file, self._payload, self._longest = info, file, payload, longest
        self._vocabulary_size = vocabulary_size
        try:
            self._blocks = Blocks(self._file.read_buffer())
            self._file.seek(0)
            self.schema = pa.ipc.open_file(self._file).schema
            metadata = shard_metadata(self.schema)
            if metadata["fingerprint"] != fingerprint:
                raise CacheDamaged("it belongs to another cache")
            check_schema(self.schema, [column.name for column in payload.columns])
            described = metadata["columns"]
            self.columns = {
                column.name: column.read_as(Column.from_metadata(column.name, described.get(column.name)))
                for column in payload.columns
            }
            self._tables = {name: tables_of(described[name]) for name in self.columns}
        except DAMAGE as error:
            raise damaged(info.file, error) from None
        self.read_by: dict[str, str | None] = {role: metadata.get(role) for role in READ_BY}
        self._decoders: dict[str, Decoder] = {}
        self._rows_per_batch: int = metadata["rows_per_batch"]
        self._readers: dict[tuple[str, ...], pa.RecordBatchFileReader] = {}
        self._checked: set[tuple[tuple[str, ...], int]] = set()  # record batches whose rows are as they should be

    def read_row(
        self, index: int, columns: Sequence[str] | None, recent: Decompressed[RowBatch], *, segments: bool = True
    ) -> StoredRow:
        """The row at `index` of this shard, from a batch in `recent` if it is there."""
        names = tuple(self.columns) if columns is None else tuple(columns)
        missing = set(names) - set(self.columns)
        if missing:
            raise KeyError(f"the targets have no column {min(missing)}; there are {', '.join(self.columns)}")
        segments = segments or any(self.columns[name].of == "pair" for name in names)  # they tell how many there are
        number, within = divmod(index, self._rows_per_batch)
        try:
            fields = (*(name for name in ROW_COLUMNS if segments or name != "segments"), *names)
            batch = recent.get((self.info.file, fields, number), lambda: RowBatch(self._read_batch(fields, number)))
            row = batch.row(within)
            counts = {"position": row.positions, "token": row.length, "pair": row.pairs}
            targets = {
                name: self._decoder(name)(batch.payload(name, within), counts[self.columns[name].of]) for name in names
            }
            self._payload.check_stored(targets)
        except DAMAGE as error:
            raise damaged(f"{self.info.file}, row {index},", error) from None
        return StoredRow(row, targets)

    def _decoder(self, name: str) -> Decoder:
        if name not in self._decoders:
            self._decoders[name] = self.columns[name].decoder(self._tables[name])
        return self._decoders[name]

    def _read_batch(self, names: tuple[str, ...], number: int) -> pa.RecordBatch:
        if (names, number) in self._checked:
            return self._reader(names).get_batch(number)
        if number >= len(self._blocks):
            raise ValueError(f"it holds {len(self._blocks)} record batches, which is fewer than its rows need")
        claimed = self._blocks.decompressed_bytes(number)
        if claimed > MOST_BATCH_BYTES:
            raise ValueError(f"record batch {number} claims {claimed} bytes, at most {MOST_BATCH_BYTES} are possible")
        batch = self._reader(names).get_batch(number)
        first = number * self._rows_per_batch
        if batch.num_rows != min(self._rows_per_batch, self.info.rows - first):
            raise ValueError(
                f"record batch {number} holds {batch.num_rows} rows, other than its place in the file says"
            )
        check_rows(
            batch,
            vocabulary_size=self._vocabulary_size,
            longest=self._longest,
            first=first,
            held_out_from=self.info.rows - self.info.held_out_rows,
        )
        self._checked.add((names, number))
        return batch

    def _reader(self, names: tuple[str, ...]) -> pa.RecordBatchFileReader:
        if names not in self._readers:
            fields = [self.schema.get_field_index(name) for name in names]
            # A batch is too little work to share: threads would take half as much time again of processors, and save none.
            options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
            self._readers[names] = pa.ipc.open_file(self._file, options=options)
        return self._readers[names]


# What reading bytes that make no sense raises.
DAMAGE = (CacheDamaged, ValueError, IndexError, KeyError, OSError, MemoryError, pa.ArrowException)


def damaged(place: str, error: BaseException) -> CacheDamaged:
    """In one line, with the remedy."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return CacheDamaged(
        f"{place} cannot be trusted: {reason}; fetch the cache again, or delete it and run `teachercache precompute` again"
    )
