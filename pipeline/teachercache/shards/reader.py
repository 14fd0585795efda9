"""`Cache`: rows of a finished cache by (split, index).

Shards are memory-mapped, opened when they are needed, and the last `OPEN_SHARDS` stay open. Their `Source` (source.py) has
hashed them before their first opening in a process, so that no byte reaches training unchecked. Reading a row decompresses
the asked-for columns of one record batch.
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
from teachercache.shards.manifest import Manifest, ShardInfo
from teachercache.shards.schema import ROW_COLUMNS, row_from_batch, shard_metadata, tables_of
from teachercache.shards.source import LocalFiles, Source, source_of
from teachercache.targets import TargetKind, target_kind
from teachercache.targets.columns import Column, Decoder
from teachercache.tokens.rows import TokenRow

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")
OPEN_SHARDS = 64
CACHED_BATCHES = 4
EVICTIONS = 10  # of a local copy between its check and its opening, by other processes


@dataclass(frozen=True, eq=False)
class StoredRow:
    """A row and its target columns as they are stored; `Cache.kind.decoded(targets)` makes them arrays of a batch."""

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
        self._kind: TargetKind | None = None

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
        """How the logit targets are read, with the basis that they need; loaded once."""
        if self._kind is None:
            manifest = self.manifest
            self._kind = target_kind(
                manifest.logits, vocabulary_size=manifest.vocabulary_size, basis=self._checked_basis()
            )
        return self._kind

    def _checked_basis(self) -> Path | None:
        """The basis that the manifest names, its bytes checked as those of shards are."""
        name = self.manifest.calibration.get("basis")
        if name is None:
            return None
        info = next((info for info in self.manifest.files if info.file == name), None)
        if info is None:
            raise CacheDamaged(
                f"{self.name}: the manifest names the basis {name}, but no such file; fetch the cache again"
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

    def read_row(self, split: Split, index: int, *, columns: Sequence[str] | None = None) -> StoredRow:
        """The row at `index` of a split, in the order of shards; `columns` limits which targets are decoded."""
        if not 0 <= index < self.rows_of(split):
            raise IndexError(f"row {index} of {self.rows_of(split)} {split} rows")
        ends = self._ends[split]
        number = int(np.searchsorted(ends, index, side="right"))
        within = index - (int(ends[number - 1]) if number else 0)
        info = self.manifest.shards[number]
        offset = info.rows - info.held_out_rows if split == "held-out" else 0
        return self._shard(number).read_row(offset + within, columns)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch shards (by their numbers, the ones needed first in front) of a cache in an object store.

        It replaces what an earlier call asked for, takes as many as half of `local_bytes` hold, and never raises: what
        cannot be fetched raises when it is read. Does nothing for a cache in a folder.
        """
        self.source.prefetch(self.manifest.shards[number] for number in shards)

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            info = self.manifest.shards[number]
            shard = Shard(self._mapped(info), info, self.manifest.fingerprint)
            if shard.basis != self.manifest.calibration.get("basis"):
                raise CacheDamaged(
                    f"{info.file} is read by the basis {shard.basis}, the manifest names "
                    f"{self.manifest.calibration.get('basis')}; fetch the cache again"
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
        return {**vars(self), "_shards": OrderedDict()}


class Shard:
    """One memory-mapped shard, whose bytes are checked by now."""

    def __init__(self, file: pa.MemoryMappedFile, info: ShardInfo, fingerprint: str) -> None:
        self.info = info
        self._file = file
        self.schema = pa.ipc.open_file(self._file).schema
        metadata = shard_metadata(self.schema, file=info.file)
        if metadata["fingerprint"] != fingerprint:
            raise CacheDamaged(f"{info.file} belongs to another cache; fetch this cache again")
        self.basis: str | None = metadata.get("basis")
        self.columns = {name: Column.from_metadata(name, entry) for name, entry in metadata["columns"].items()}
        self._tables = {name: tables_of(entry) for name, entry in metadata["columns"].items()}
        self._decoders: dict[str, Decoder] = {}
        self._rows_per_batch: int = metadata["rows_per_batch"]
        self._readers: dict[tuple[str, ...], pa.RecordBatchFileReader] = {}
        self._batches: OrderedDict[tuple[tuple[str, ...], int], pa.RecordBatch] = OrderedDict()

    def read_row(self, index: int, columns: Sequence[str] | None) -> StoredRow:
        """The row at `index` of this shard."""
        names = tuple(self.columns) if columns is None else tuple(columns)
        batch = self._batch(names, index // self._rows_per_batch)
        within = index % self._rows_per_batch
        row = row_from_batch(batch, within)
        targets = {name: self._decoder(name)(batch.column(name)[within].as_buffer(), row.positions) for name in names}
        return StoredRow(row, targets)

    def _decoder(self, name: str) -> Decoder:
        if name not in self._decoders:
            self._decoders[name] = self.columns[name].decoder(self._tables[name])
        return self._decoders[name]

    def _batch(self, names: tuple[str, ...], number: int) -> pa.RecordBatch:
        batch = self._batches.get((names, number))
        if batch is None:
            batch = self._batches[names, number] = self._reader(names).get_batch(number)
            if len(self._batches) > CACHED_BATCHES:
                self._batches.popitem(last=False)
        return batch

    def _reader(self, names: tuple[str, ...]) -> pa.RecordBatchFileReader:
        if names not in self._readers:
            fields = [self.schema.get_field_index(name) for name in (*ROW_COLUMNS, *names)]
            options = pa.ipc.IpcReadOptions(included_fields=fields)
            self._readers[names] = pa.ipc.open_file(self._file, options=options)
        return self._readers[names]
