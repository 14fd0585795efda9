"""Rows of a split as a map-style `torch.utils.data.Dataset`, over one cache or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from teachercache.cache import Cache, StoredRow
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.reader import Split
from teachercache.stream.aligned_rows import JoinedRow
from teachercache.stream.ensemble_rows import EnsembleRow, TeacherCache
from teachercache.stream.withheld import Trained


@dataclass(frozen=True)
class Rows:
    """Rows of a micro-batch, all of them of the cache `source` of a dataset."""

    source: int
    rows: Sequence[StoredRow | JoinedRow]


class CacheDataset(Dataset[Rows]):
    """Row `index` of a split with the target columns that are asked for of its cache; nothing else is decompressed.

    With `alignments`, one a cache, rows are joined to a student's tokens. With `other_teachers` rows are `EnsembleRow`s, which
    hold what each of them has of the row, by `other_columns`. Rows of several caches are numbered one cache after the
    other; of the train split, `trained` ones among themselves. Picklable: a loading process opens shards, and checks
    their bytes, for itself.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        split: Split,
        *,
        columns: Sequence[tuple[str, ...]],
        alignments: Sequence[CacheAlignment] = (),
        other_teachers: Sequence[TeacherCache] = (),
        other_columns: Sequence[tuple[str, ...]] = (),
        trained: Trained | None = None,
    ) -> None:
        self.caches = tuple(caches)
        self.alignments = tuple(alignments)
        self.split = split
        self.columns = tuple(columns)
        self.other_teachers = tuple(zip(other_teachers, other_columns, strict=True))
        rows = trained.rows if trained is not None and split == "train" else (None,) * len(self.caches)
        self._rows = rows  # of each cache, those that there are; None: all
        self._ends = np.cumsum(
            [cache.rows_of(split) if kept is None else len(kept) for cache, kept in zip(caches, rows, strict=True)]
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Rows:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        """A micro-batch; torch's loaders call this. Its rows are of one cache; none at all count as the first one's."""
        source = int(np.searchsorted(self._ends, indices[0], side="right")) if len(indices) else 0
        cache, columns = self.caches[source], self.columns[source]
        start, kept = int(self._ends[source - 1]) if source else 0, self._rows[source]
        # In the order of the file, so that a record batch is decompressed once for all of its rows.
        packed = cache.manifest.layout == "packed"  # else nobody asks for segments, and for the text in them
        read: dict[int, StoredRow | JoinedRow] = {}
        for index in sorted(indices):
            number = index - start if kept is None else int(kept[index - start])
            stored = cache.read_row(self.split, number, columns=columns, segments=packed)
            read[index] = self._joined(source, number, stored, packed) if self.alignments else stored
            if self.other_teachers:
                read[index] = self._taught(source, number, stored)
        return Rows(source, [read[index] for index in indices])

    def _joined(self, source: int, index: int, stored: StoredRow, packed: bool) -> JoinedRow:
        found = self.alignments[source].joined(self.split, index, stored, segments=packed)
        return JoinedRow(found.row, stored, found.targets)

    def _taught(self, source: int, index: int, stored: StoredRow) -> EnsembleRow:
        row_id = stored.row.row_id
        other_teachers = (
            teacher.read(source, self.split, index, row_id=row_id, columns=columns)
            for teacher, columns in self.other_teachers
        )
        return EnsembleRow(stored.row, stored.targets, tuple(other_teachers))
