"""Rows of a split as a map-style `torch.utils.data.Dataset`, over one cache or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from teachercache.cache.reader import Split
from teachercache.stream.cache_rows import CacheRows
from teachercache.stream.withheld import Trained


@dataclass(frozen=True)
class Rows:
    """Rows of a micro-batch, all of them of the cache `source` of a dataset, as its `CacheRows` read them."""

    source: int
    rows: Sequence[Any]


class CacheDataset(Dataset[Rows]):
    """Row `index` of a split, as the `rows` of its cache read it.

    Rows of several caches are numbered one cache after the other; of the train split, `trained` ones among themselves.
    Picklable: a loading process opens shards, and checks their bytes, for itself.
    """

    def __init__(self, rows: Sequence[CacheRows], split: Split, *, trained: Trained | None = None) -> None:
        self.rows = tuple(rows)
        self.split = split
        kept = trained.rows if trained is not None and split == "train" else (None,) * len(self.rows)
        self._kept = kept  # of each cache, those that there are; None: all
        self._ends = np.cumsum(
            [
                cache_rows.cache.rows_of(split) if numbers is None else len(numbers)
                for cache_rows, numbers in zip(rows, kept, strict=True)
            ]
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Rows:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        """A micro-batch; torch's loaders call this. Its rows are of one cache; none at all count as the first one's."""
        source = int(np.searchsorted(self._ends, indices[0], side="right")) if len(indices) else 0
        start, kept = int(self._ends[source - 1]) if source else 0, self._kept[source]
        # In the order of the file, so that a record batch is decompressed once for all of its rows.
        read = {}
        for index in sorted(indices):
            number = index - start if kept is None else int(kept[index - start])
            read[index] = self.rows[source].read(self.split, number)
        return Rows(source, [read[index] for index in indices])
