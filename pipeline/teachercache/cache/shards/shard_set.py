"""The shards of a cache, or of an alignment: rows by (split, index).

Shards are memory-mapped, opened when they are needed, and the last `OPEN_SHARDS` stay open. Their `Source` (source.py) has
hashed them before their first opening in a process, so that no byte reaches training unchecked. Reading a row decompresses
the asked-for columns of one record batch; the batches that were used last stay in memory, up to `KEPT_BYTES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from teachercache.cache.files.entries import FileInfo, ShardInfo, ShardTable
from teachercache.cache.files.regular_files import path_of_open
from teachercache.cache.shards.decompressed import Decompressed
from teachercache.cache.shards.row_batch import RowBatch
from teachercache.cache.shards.shard import Shard, StoredRow
from teachercache.cache.storage.source import Source

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")
OPEN_SHARDS = 256  # a group of blocks may lie in as many as it has blocks
# Of decompressed record batches, in each process. In a random order a cache that fits is decompressed once, and each row of a
# larger one costs the batch around it (tests/bench/reader_peers.py measures both).
KEPT_BYTES = 256 * 2**20


class ShardSet(ABC):
    """Shards in order. Who has them derives from this and says how one is opened: a reference back from a shard would keep
    files mapped, and their local copies on disk, until the garbage is collected.

    Picklable: workers open files for themselves.
    """

    def __init__(self, infos: ShardTable, source: Source) -> None:
        self.infos, self.source = infos, source
        held_out = infos.counted("held_out_rows")
        self._train_rows = infos.counted("rows") - held_out
        self._ends = {"train": np.cumsum(self._train_rows), "held-out": np.cumsum(held_out)}
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._same_rows: set[int] = set()  # shards whose rows are those that the index says
        self.recent: Decompressed[RowBatch] = Decompressed(KEPT_BYTES)

    def rows_of(self, split: Split) -> int:
        """Number of rows of a split."""
        ends = self._ends[split]
        return int(ends[-1]) if len(ends) else 0

    def read_row(
        self, split: Split, index: int, *, columns: Sequence[str] | None = None, segments: bool = True
    ) -> StoredRow:
        """The row at `index` of a split, in the order of shards; `columns` limits what is decoded beside its tokens. Without
        `segments` the row has none, and text is not decompressed."""
        if not 0 <= index < self.rows_of(split):
            raise IndexError(f"row {index} of {self.rows_of(split)} {split} rows")
        ends = self._ends[split]
        number = int(np.searchsorted(ends, index, side="right"))
        within = index - (int(ends[number - 1]) if number else 0)
        offset = int(self._train_rows[number]) if split == "held-out" else 0
        return self.shard(number).read_row(offset + within, columns, self.recent, segments=segments)

    @abstractmethod
    def opened(self, info: ShardInfo, mapped: Callable[[FileInfo], pa.MemoryMappedFile]) -> Shard:
        """A shard, whose files `mapped` maps, once what is known of it is checked."""

    def shard(self, number: int) -> Shard:
        """The shard of that number, opened if it was not."""
        shard = self._shards.get(number)
        if shard is None:
            shard = self.opened(self.infos[number], partial(mapped, self.source))
            if number not in self._same_rows:
                shard.check_row_ids()
                self._same_rows.add(number)
            self._shards[number] = shard
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": OrderedDict(), "_same_rows": set(), "recent": Decompressed(KEPT_BYTES)}


def mapped(source: Source, info: FileInfo) -> pa.MemoryMappedFile:
    """A file of a cache in memory, its bytes checked."""
    with source.opened(info) as stream:
        return pa.memory_map(str(path_of_open(stream)))
