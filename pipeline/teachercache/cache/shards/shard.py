"""One shard: rows by index, from one memory-mapped file a column group, checked before they are handed out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
from numpy.typing import NDArray

from teachercache.cache.files.bounds import MOST_BATCH_BYTES
from teachercache.cache.files.column_groups import ID_FIELD, Group
from teachercache.cache.files.entries import FileInfo, ShardInfo
from teachercache.cache.files.schema import ROW_COLUMNS, tables_of
from teachercache.cache.shards.decompressed import Decompressed
from teachercache.cache.shards.ipc_blocks import Blocks
from teachercache.cache.shards.row_batch import RowBatch
from teachercache.cache.shards.row_checks import check_rows, check_values
from teachercache.cache.shards.row_ids import check_same_rows, digest_of_ids, row_ids_of
from teachercache.errors import CacheDamaged
from teachercache.targets.coding.columns import Column, Decoder, check_row_bytes
from teachercache.tokens.rows import TokenRow

Check = Callable[[pa.RecordBatch, int], None]  # of a batch and the index of its first row in the shard


class Payload(Protocol):
    """Columns of rows beside their tokens: targets of a teacher, or the alignment with its tokens."""

    def check_stored(self, stored: Mapping[str, NDArray[Any]]) -> None:
        """Raise `CacheDamaged` where a row's columns, those that are there, cannot be."""


@dataclass(frozen=True, eq=False)
class StoredRow:
    """A row and its columns as they are stored; `decoded` of a kind in `Cache.targets` makes them arrays of a batch."""

    row: TokenRow
    targets: dict[str, NDArray[Any]]


class ShardFile:
    """One memory-mapped file of a shard, whose bytes are checked by now, but not what they say: see manifest/checks.py.

    Raises `CacheDamaged`, naming file and remedy, for a file that cannot be one of such a group.
    """

    def __init__(self, file: pa.MemoryMappedFile, name: str, group: Group) -> None:
        self.name, self._file = name, file
        try:
            self._blocks = Blocks(self._file.read_buffer())
            self._file.seek(0)
            self.schema = pa.ipc.open_file(self._file).schema
            metadata = group.checked(self.schema)
            described = metadata["columns"]
            self.columns = {
                column.name: column.read_as(Column.from_metadata(column.name, described.get(column.name)))
                for column in group.columns
            }
            self._tables = {name: tables_of(described[name]) for name in self.columns}
        except DAMAGE as error:
            raise damaged(name, error) from None
        self.rows_per_batch: int = metadata["rows_per_batch"]
        self._decoders: dict[str, Decoder] = {}
        self._readers: dict[tuple[str, ...], pa.RecordBatchFileReader] = {}
        self._checked: set[tuple[tuple[str, ...], int]] = set()  # record batches whose rows are as they should be

    def check_row_ids(self, row_ids: str, *, rows: int) -> None:
        """Raise `CacheDamaged` where its rows are not so many, or not those of this digest."""
        try:
            if row_ids:  # format 1 tells none
                ids = row_ids_of(self._file, rows=rows, schema=self.schema, blocks=self._blocks)
                check_same_rows(digest_of_ids(ids), row_ids)
        except DAMAGE as error:
            raise damaged(self.name, error) from None

    def row_batch(
        self, index: int, fields: tuple[str, ...], recent: Decompressed[RowBatch], check: Check, *, rows: int
    ) -> tuple[RowBatch, int]:
        """The record batch with row `index` of so many, from `recent` if it is there, and the row's place in it."""
        number, within = divmod(index, self.rows_per_batch)
        batch = recent.get(
            (self.name, fields, number), lambda: RowBatch(self._read_batch(fields, number, check, rows=rows))
        )
        return batch, within

    def decoded(
        self, stored: Mapping[str, memoryview], counts: Mapping[str, int], *, before: int
    ) -> dict[str, NDArray[Any]]:
        """A row's arrays of some columns; `counts` is how many positions, tokens and pairs the row has, `before` the bytes that
        columns of other files take."""
        entries = {name: counts[self.columns[name].of] for name in stored}
        claims = (self.columns[name].decoded_bytes(data, entries[name]) for name, data in stored.items())
        check_row_bytes(claims, before=before)
        return {name: self._decoder(name)(data, entries[name]) for name, data in stored.items()}

    def _decoder(self, name: str) -> Decoder:
        if name not in self._decoders:
            self._decoders[name] = self.columns[name].decoder(self._tables[name])
        return self._decoders[name]

    def _read_batch(self, names: tuple[str, ...], number: int, check: Check, *, rows: int) -> pa.RecordBatch:
        if (names, number) in self._checked:
            return self._reader(names).get_batch(number)
        if number >= len(self._blocks):
            raise ValueError(f"it holds {len(self._blocks)} record batches, which is fewer than its rows need")
        claimed = self._blocks.decompressed_bytes(number)
        if claimed > MOST_BATCH_BYTES:
            raise ValueError(f"record batch {number} claims {claimed} bytes, at most {MOST_BATCH_BYTES} are possible")
        batch = self._reader(names).get_batch(number)
        first = number * self.rows_per_batch
        if batch.num_rows != min(self.rows_per_batch, rows - first):
            raise ValueError(
                f"record batch {number} holds {batch.num_rows} rows, other than its place in the file says"
            )
        check(batch, first)
        self._checked.add((names, number))
        return batch

    def _reader(self, names: tuple[str, ...]) -> pa.RecordBatchFileReader:
        if names not in self._readers:
            fields = [self.schema.get_field_index(name) for name in names]
            # A batch is too little work to share: threads would take half as much time again of processors, and save none.
            options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
            self._readers[names] = pa.ipc.open_file(self._file, options=options)
        return self._readers[names]


class Shard:
    """One shard: rows by index, from the files of the groups whose columns are asked for; others are never opened.

    `mapped` maps a file whose bytes are checked. `payload` says what columns mean, `longest` how many tokens a row may have.
    """

    def __init__(
        self,
        info: ShardInfo,
        mapped: Callable[[FileInfo], pa.MemoryMappedFile],
        *,
        groups: Sequence[Group],
        payload: Payload,
        vocabulary_size: int,
        longest: int,
    ) -> None:
        self.info, self._mapped, self._groups, self._payload = info, mapped, groups, payload
        self._longest, self._vocabulary_size = longest, vocabulary_size
        self._files: dict[str, ShardFile] = {}
        self._sound: set[tuple[tuple[str, ...], int]] = set()  # rows whose values are as they should be, by columns
        self._group_of = {column.name: group for group in groups for column in group.columns}
        self._by_pair = {column.name for group in groups for column in group.columns if column.of == "pair"}

    def file(self, group: Group) -> ShardFile:
        """The file of a group, opened if it was not."""
        if group.folder not in self._files:
            info = self.info.files[group.folder]
            self._files[group.folder] = ShardFile(self._mapped(info), info.file, group)
        return self._files[group.folder]

    def check_row_ids(self) -> None:
        """Raise `CacheDamaged` where its rows are not those that the index says; other groups name theirs row by row."""
        self.file(self._groups[0]).check_row_ids(self.info.row_ids, rows=self.info.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names of all groups."""
        return tuple(self._group_of)

    def read_row(
        self, index: int, columns: Sequence[str] | None, recent: Decompressed[RowBatch], *, segments: bool = True
    ) -> StoredRow:
        """The row at `index` of this shard, from batches in `recent` if they are there."""
        names = self.columns if columns is None else tuple(columns)
        missing = set(names) - set(self._group_of)
        if missing:
            raise KeyError(f"the targets have no column {min(missing)}; there are {', '.join(self.columns)}")
        # Segments tell how many pairs there are.
        segments = segments or not self._by_pair.isdisjoint(names)
        row, targets = self._row(index, names, recent, segments=segments)
        if len(targets) < len(names):
            for group in self._groups[1:]:
                before = sum(values_N.nbytes for values_N in targets.values())
                targets |= self._further(group, index, names, row, recent, before=before)
        if (names, index) not in self._sound:  # once, as the rows of a batch: what is mapped is what was hashed
            try:
                self._payload.check_stored(targets)
            except DAMAGE as error:
                raise damaged(f"{self.info.file}, row {index},", error) from None
            self._sound.add((names, index))
        return StoredRow(row, {name: targets[name] for name in names})

    def _row(
        self, index: int, names: Sequence[str], recent: Decompressed[RowBatch], *, segments: bool
    ) -> tuple[TokenRow, dict[str, NDArray[Any]]]:
        group = self._groups[0]
        file = self.file(group)
        payload_names = tuple(name for name in names if self._group_of[name] is group)
        fields = (*(name for name in ROW_COLUMNS if segments or name != "segments"), *payload_names)
        try:
            batch, within = file.row_batch(index, fields, recent, self._check_rows, rows=self.info.rows)
            row = batch.row(within)
            stored = {name: batch.payload(name, within) for name in payload_names}
            return row, file.decoded(stored, _counts(row), before=0)
        except DAMAGE as error:
            raise damaged(f"{file.name}, row {index},", error) from None

    def _further(
        self,
        group: Group,
        index: int,
        names: tuple[str, ...],
        row: TokenRow,
        recent: Decompressed[RowBatch],
        *,
        before: int,
    ) -> dict[str, NDArray[Any]]:
        names = tuple(name for name in names if self._group_of[name] is group)
        if not names:
            return {}
        file = self.file(group)
        try:
            fields = (ID_FIELD.name, *names)
            batch, within = file.row_batch(index, fields, recent, check_values, rows=self.info.rows)
            if bytes(batch.payload(ID_FIELD.name, within)) != row.row_id.encode():
                raise CacheDamaged(f"it has another row in the place of {row.row_id}")
            stored = {name: batch.payload(name, within) for name in names}
            return file.decoded(stored, _counts(row), before=before)
        except DAMAGE as error:
            raise damaged(f"{file.name}, row {index},", error) from None

    def _check_rows(self, batch: pa.RecordBatch, first: int) -> None:
        check_rows(
            batch,
            vocabulary_size=self._vocabulary_size,
            longest=self._longest,
            first=first,
            held_out_from=self.info.rows - self.info.held_out_rows,
        )


def _counts(row: TokenRow) -> dict[str, int]:
    return {"position": row.positions, "token": row.length, "pair": row.pairs}


# What reading bytes that make no sense raises.
DAMAGE = (CacheDamaged, ValueError, IndexError, KeyError, OSError, MemoryError, pa.ArrowException)


def damaged(place: str, error: BaseException) -> CacheDamaged:
    """In one line, with the remedy."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return CacheDamaged(
        f"{place} cannot be trusted: {reason}; fetch the cache again, or delete it and run `teachercache precompute` again"
    )
