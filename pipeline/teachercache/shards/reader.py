"""`Cache`: rows of a finished cache by (split, index).

Shards are memory-mapped, opened when they are needed, and the last `OPEN_SHARDS` stay open. Their `Source` (source.py) has
hashed them before their first opening in a process, so that no byte reaches training unchecked. Reading a row decompresses
the asked-for columns of one record batch; the batches that were used last stay in memory, up to `KEPT_BYTES`.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachercache.config import LOCAL_COPIES, LOCAL_COPIES_BYTES
from teachercache.errors import CacheDamaged, CacheError, JobFailed
from teachercache.shards.claims import MOST_BATCH_BYTES, check_rows
from teachercache.shards.decompressed import Decompressed
from teachercache.shards.ipc_blocks import Blocks
from teachercache.shards.manifest import Manifest, ShardInfo
from teachercache.shards.row_batch import RowBatch
from teachercache.shards.schema import READ_BY, ROW_COLUMNS, check_schema, shard_metadata, tables_of
from teachercache.shards.source import LocalFiles, Source, source_of
from teachercache.targets import LayerFile, StoredTargets, TargetKind, target_kind
from teachercache.targets.columns import Column, Decoder
from teachercache.tokens.rows import TokenRow

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")
OPEN_SHARDS = 256  # a group of blocks may lie in as many as it has blocks
# Of decompressed record batches, in each process. In a random order a cache that fits is decompressed once, and each row of a
# larger one costs the batch around it (tests/bench/reader_peers.py measures both).
KEPT_BYTES = 256 * 2**20
EVICTIONS = 10  # of a local copy between its check and its opening, by other processes


@dataclass(frozen=True, eq=False)
class StoredRow:
    """A row and its target columns as they are stored; `decoded` of a kind in `Cache.targets` makes them arrays of a batch."""

    row: TokenRow
    targets: dict[str, NDArray[Any]]


class Cache:
    """A finished cache. Cheap to open whatever its size; picklable, workers open files for themselves."""

    def __init__(self, source: Source, manifest: Manifest) -> None:
        self.source = source
        self.manifest = manifest
        held_out = np.array([shard.held_out_rows for shard in manifest.shards], dtype=np.int64)
        train = np.array([shard.rows for shard in manifest.shards], dtype=np.int64) - held_out
        self._ends = {"train": np.cumsum(train), "held-out": np.cumsum(held_out)}
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._targets: StoredTargets | None = None
        self.recent: Decompressed[RowBatch] = Decompressed(KEPT_BYTES)

    @classmethod
    def open(
        cls, location: str | Path, *, local: str | Path = LOCAL_COPIES, local_bytes: int = LOCAL_COPIES_BYTES
    ) -> Cache:
        """Open the cache in a folder, or at a URL such as `s3://BUCKET/PREFIX`.

        Files of a URL are fetched when they are needed, checked, and kept in the folder `local`, which holds at most
        `local_bytes` and which all processes of a machine share. Raises `CacheError` when the cache is missing or half
        written, `CacheDamaged` when its manifest cannot be trusted, `JobFailed` when an object store does not answer.
        """
        source = source_of(location, local=local, local_bytes=local_bytes)
        return cls(source, source.manifest())

    @property
    def name(self) -> str:
        """The folder or URL, for messages."""
        return self.source.name

    @property
    def folder(self) -> Path:
        """The folder of a cache that lies in one. Raises `CacheError` for one in an object store."""
        if not isinstance(self.source, LocalFiles):
            raise CacheError(f"{self.name} is in an object store; copy it into a folder for this")
        return self.source.folder

    @property
    def kind(self) -> TargetKind:
        """How the logit targets are read, with the basis that they need."""
        return self.targets.logits

    @property
    def logit_columns(self) -> tuple[str, ...]:
        """Columns of the logit targets."""
        return tuple(column.name for column in self.kind.columns)

    @property
    def targets(self) -> StoredTargets:
        """How everything that is stored of the teacher is read, with the files that this needs; loaded once."""
        if self._targets is None:
            manifest = self.manifest
            basis, layers = (self._checked_file(name) for name in READ_BY)
            kind = target_kind(manifest.logits, vocabulary_size=manifest.vocabulary_size, basis=basis)
            targets = StoredTargets.of(manifest.targets, kind)
            if targets.needs_layer_file and layers is None:
                raise CacheDamaged(f"{self.name}: the manifest names no layer file; fetch the cache again")
            self._targets = (
                targets.with_layer_file(LayerFile.load(layers), longest=manifest.sequence_length, name=layers)
                if layers
                else targets
            )
        return self._targets

    def _checked_file(self, role: str) -> Path | None:
        """The file that the manifest names to read targets by, its bytes checked as those of shards are."""
        name = self.manifest.calibration.get(role)
        if name is None:
            return None
        info = next((info for info in self.manifest.files if info.file == name), None)
        if info is None:
            raise CacheDamaged(
                f"{self.name}: the manifest names the {role} {name}, but no such file; fetch the cache again"
            )
        return self.source.path_of(info)

    @property
    def teacher_folder(self) -> Path:
        """Tokenizer files and the teacher's config.json: what training needs instead of the teacher."""
        return self.source.teacher_folder(self.manifest)

    def rows_of(self, split: Split) -> int:
        """Number of rows of a split."""
        ends = self._ends[split]
        return int(ends[-1]) if len(ends) else 0

    def positions_of(self, split: Split) -> int:
        """Number of stored targets of a split."""
        held_out = sum(shard.held_out_positions for shard in self.manifest.shards)
        return held_out if split == "held-out" else self.manifest.positions - held_out

    def read_row(
        self, split: Split, index: int, *, columns: Sequence[str] | None = None, segments: bool = True
    ) -> StoredRow:
        """The row at `index` of a split, in the order of shards; `columns` limits which targets are decoded. Without
        `segments` the row has none, and text is not decompressed."""
        if not 0 <= index < self.rows_of(split):
            raise IndexError(f"row {index} of {self.rows_of(split)} {split} rows")
        ends = self._ends[split]
        number = int(np.searchsorted(ends, index, side="right"))
        within = index - (int(ends[number - 1]) if number else 0)
        info = self.manifest.shards[number]
        offset = info.rows - info.held_out_rows if split == "held-out" else 0
        return self._shard(number).read_row(offset + within, columns, self.recent, segments=segments)

    @property
    def is_remote(self) -> bool:
        """Whether it is in an object store."""
        return not isinstance(self.source, LocalFiles)

    def prefetch(self, shards: Iterable[int], *, caches: int = 1) -> None:
        """Begin to fetch shards (by their numbers, the ones needed first in front) of a cache in an object store.

        It replaces what an earlier call asked for, takes as many as half of `local_bytes` hold (shared among so many
        `caches`), and never raises: what
        cannot be fetched raises when it is read. Does nothing for a cache in a folder.
        """
        self.source.prefetch((self.manifest.shards[number] for number in shards), caches=caches)

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            info = self.manifest.shards[number]
            shard = Shard(
                self._mapped(info),
                info,
                fingerprint=self.manifest.fingerprint,
                targets=self.targets,
                longest=self.manifest.sequence_length,
            )
            for role in READ_BY:
                found, named = shard.read_by[role], self.manifest.calibration.get(role)
                if found != named:
                    raise CacheDamaged(
                        f"{info.file} is read by the {role} {found}, the manifest names {named}; fetch the cache again"
                    )
            self._shards[number] = shard
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return shard

    def _mapped(self, info: ShardInfo) -> pa.MemoryMappedFile:
        for _ in range(EVICTIONS):
            with contextlib.suppress(FileNotFoundError):
                return pa.memory_map(str(self.source.path_of(info)))
        raise JobFailed(
            f"the local copy of {info.file} was evicted {EVICTIONS} times before it could be read: too many shards are "
            "in use for stream.local_bytes; raise it"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": OrderedDict(), "recent": Decompressed(KEPT_BYTES)}


class Shard:
    """One memory-mapped shard, whose bytes are checked by now, but not what they say: see claims.py.

    `targets` say which columns it must have, `longest` how many tokens a row may have. Everything raises `CacheDamaged`,
    naming file and remedy, for a shard that cannot be one of such a cache.
    """

    def __init__(
        self, file: pa.MemoryMappedFile, info: ShardInfo, *, fingerprint: str, targets: StoredTargets, longest: int
    ) -> None:
        self.info, self._file, self._stored, self._longest = info, file, targets, longest
        try:
            self._blocks = Blocks(self._file.read_buffer())
            self._file.seek(0)
            self.schema = pa.ipc.open_file(self._file).schema
            metadata = shard_metadata(self.schema)
            if metadata["fingerprint"] != fingerprint:
                raise CacheDamaged("it belongs to another cache")
            check_schema(self.schema, [column.name for column in targets.columns])
            described = metadata["columns"]
            self.columns = {
                column.name: column.read_as(Column.from_metadata(column.name, described.get(column.name)))
                for column in targets.columns
            }
            self._tables = {name: tables_of(described[name]) for name in self.columns}
        except DAMAGE as error:
            raise _damaged(info.file, error) from None
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
            self._stored.check_stored(targets)
        except DAMAGE as error:
            raise _damaged(f"{self.info.file}, row {index},", error) from None
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
            vocabulary_size=self._stored.logits.vocabulary_size,
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


def _damaged(place: str, error: BaseException) -> CacheDamaged:
    """In one line, with the remedy."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return CacheDamaged(
        f"{place} cannot be trusted: {reason}; fetch the cache again, or delete it and run `teachercache precompute` again"
    )
