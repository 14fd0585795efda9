"""Rows of a split as a map-style `torch.utils.data.Dataset`."""

from __future__ import annotations

from torch.utils.data import Dataset

from teachercache.shards import Cache, StoredRow
from teachercache.shards.reader import Split


class CacheDataset(Dataset[StoredRow]):
    """Row `index` of a split with the target columns that are asked for; nothing else is decompressed.

    Picklable: a loading process opens shards, and checks their bytes, for itself.
    """

    def __init__(self, cache: Cache, split: Split, *, columns: tuple[str, ...]) -> None:
        self.cache = cache
        self.split = split
        self.columns = columns

    def __len__(self) -> int:
        return self.cache.rows_of(self.split)

    def __getitem__(self, index: int) -> StoredRow:
        return self.cache.read_row(self.split, index, columns=self.columns)
