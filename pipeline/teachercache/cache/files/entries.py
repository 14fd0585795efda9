"""Entries of a manifest: files with their digests, and shards, of which it may list a hundred thousand.

A shard is one part of the rows: one file for each column group, with the same rows in the same order. Shards are kept as
columns, and become objects where they are asked for: that many open in a fraction of a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from teachercache.cache.files.digests import hash_file

ROWS_GROUP = "shards"  # the folder of the files that hold the columns of every row
COUNTS = ("rows", "held_out_rows", "positions", "held_out_positions", "tokens")
FILE_COLUMNS = ("file", "bytes", "sha256")
MOST_NAME = 512  # characters of a file's name with its folders
MOST_COUNT = 2**53  # of anything
_PLAIN = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileInfo:
    """A file: its path inside the cache, size and sha256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardInfo:
    """A shard. Its first `rows - held_out_rows` rows are for training, the rest is held out.

    `row_ids` is the sha256 over the ids of its rows, one after the other, 16 bytes each ("" where format 1 did not tell);
    `files` are its files by column group.
    """

    rows: int
    held_out_rows: int
    positions: int
    held_out_positions: int
    tokens: int
    row_ids: str
    files: dict[str, FileInfo]

    @property
    def rows_file(self) -> FileInfo:
        """The file with the columns of every row."""
        return next(iter(self.files.values()))

    @property
    def file(self) -> str:
        """The name of that file, by which messages call the shard."""
        return self.rows_file.file

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(info.bytes for info in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """As a record of a finished unit holds it."""
        return {**vars(self), "files": {group: vars(info) for group, info in self.files.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShardInfo:
        """Inverse of `to_json`."""
        files = {group: FileInfo(**info) for group, info in data["files"].items()}
        return cls(**{**data, "files": files})


class FileTable(Sequence[FileInfo]):
    """Files in order, as columns."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int], digests: Sequence[str]) -> None:
        self.names, self.digests = list(names), list(digests)
        self.sizes = _checked_counts("bytes", sizes)
        if not len(self.names) == len(self.sizes) == len(self.digests):
            raise ValueError("its lists of files are not of one length")
        for name in self.names:
            check_inside(name)
        for digest in self.digests:
            if not (type(digest) is str and _SHA256.fullmatch(digest)):
                raise ValueError(f"a sha256 of a file is none: {str(digest)[:80]!r}")

    @classmethod
    def of(cls, infos: Iterable[FileInfo]) -> FileTable:
        """From entries."""
        infos = list(infos)
        return cls([i.file for i in infos], [i.bytes for i in infos], [i.sha256 for i in infos])

    @classmethod
    def from_entries(cls, entries: Iterable[Mapping[str, Any]]) -> FileTable:
        """From a list of files, each with its own keys. Raises as `from_columns` does."""
        entries = list(entries)
        return cls(*([entry[name] for entry in entries] for name in FILE_COLUMNS))

    @classmethod
    def from_columns(cls, parts: Sequence[Mapping[str, Any]]) -> FileTable:
        """Inverse of `to_columns`, of several tables one after the other. Raises `ValueError`, `KeyError` or `TypeError` for
        what lists no files."""
        return cls(*(_chained(part[name] for part in parts) for name in FILE_COLUMNS))

    def to_columns(self, chosen: slice = slice(None)) -> dict[str, list[Any]]:
        """As an index file holds them."""
        return {
            "file": self.names[chosen],
            "bytes": self.sizes[chosen].tolist(),
            "sha256": self.digests[chosen],
        }

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> FileInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[FileInfo]: ...
    def __getitem__(self, index: int | slice) -> FileInfo | list[FileInfo]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return FileInfo(self.names[index], int(self.sizes[index]), self.digests[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileTable) and self.to_columns() == other.to_columns()

    def __hash__(self) -> int:
        return hash(tuple(self.digests))


class ShardTable(Sequence[ShardInfo]):
    """Shards in order, as columns. Raises `ValueError` for counts that cannot be."""

    def __init__(
        self, counts: Mapping[str, Sequence[int]], row_ids: Sequence[str], files: Mapping[str, FileTable]
    ) -> None:
        self._counts = {name: _checked_counts(name, counts[name]) for name in COUNTS}
        self.row_ids, self.files = list(row_ids), dict(files)
        lengths = {len(self.row_ids), *map(len, self._counts.values()), *map(len, self.files.values())}
        if len(lengths) > 1 or not self.files:
            raise ValueError("its lists of shards are not of one length")
        if {type(row_id) for row_id in self.row_ids} - {str}:
            raise ValueError("a row_ids of a shard is no text")
        rows, held_out = self.counted("rows"), self.counted("held_out_rows")
        wrong = (held_out > rows) | (self.counted("held_out_positions") > self.counted("positions")) | (rows == 0)
        if wrong.any():
            number = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"{self[number].file} claims {held_out[number]} of {rows[number]} rows held out")

    @classmethod
    def of(cls, infos: Iterable[ShardInfo], *, groups: Iterable[str] = ()) -> ShardTable:
        """From entries; `groups` are those of no shards at all."""
        infos = list(infos)
        names = list(infos[0].files if infos else groups) or [ROWS_GROUP]
        return cls(
            {name: [getattr(info, name) for info in infos] for name in COUNTS},
            [info.row_ids for info in infos],
            {group: FileTable.of(info.files[group] for info in infos) for group in names},
        )

    @classmethod
    def from_columns(cls, parts: Sequence[Mapping[str, Any]], groups: Iterable[str]) -> ShardTable:
        """Inverse of `to_columns`, of several tables one after the other, for the groups that the manifest names. Raises as
        `FileTable.from_columns` does."""
        files = {
            group: FileTable(*(_chained(part["files"][group][name] for part in parts) for name in FILE_COLUMNS))
            for group in groups
        }
        counts = {name: _chained(part[name] for part in parts) for name in COUNTS}
        return cls(counts, _chained(part["row_ids"] for part in parts), files)

    def to_columns(self, chosen: slice = slice(None)) -> dict[str, Any]:
        """As an index file holds them."""
        return {
            **{name: values[chosen].tolist() for name, values in self._counts.items()},
            "row_ids": self.row_ids[chosen],
            "files": {group: table.to_columns(chosen) for group, table in self.files.items()},
        }

    def counted(self, name: str) -> NDArray[np.int64]:
        """One of `COUNTS`, of each shard."""
        return self._counts[name]

    def sizes(self, groups: Iterable[str] | None = None) -> NDArray[np.int64]:
        """Bytes of each shard's files, of all column groups or of some."""
        chosen = self.files if groups is None else [group for group in self.files if group in set(groups)]
        sizes: NDArray[np.int64] = np.sum(
            [np.zeros(len(self), np.int64), *(self.files[group].sizes for group in chosen)], axis=0
        )
        return sizes

    @property
    def train_positions(self) -> int:
        """Stored targets of rows that are not held out."""
        return int((self.counted("positions") - self.counted("held_out_positions")).sum())

    def totals(self) -> dict[str, int]:
        """Returns the number of shards, and the sums over all of them."""
        counts = {name: int(values.sum()) for name, values in self._counts.items()}
        return {"shards": len(self), **counts, "bytes": int(self.sizes().sum())}

    def names(self) -> list[str]:
        """Every file's name, group after group."""
        return _chained(table.names for table in self.files.values())

    def all_files(self) -> Iterator[FileInfo]:
        """Every file, shard after shard."""
        return (info for shard in self for info in shard.files.values())

    def __len__(self) -> int:
        return len(self.row_ids)

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardInfo]: ...
    def __getitem__(self, index: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        counts = {name: int(values[index]) for name, values in self._counts.items()}
        files = {group: table[index] for group, table in self.files.items()}
        return ShardInfo(**counts, row_ids=self.row_ids[index], files=files)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and self.to_columns() == other.to_columns()

    def __hash__(self) -> int:
        return hash(tuple(self.row_ids))


def _chained(lists: Iterable[list[Any]]) -> list[Any]:
    return [value for values in lists for value in values]


def _checked_counts(name: str, values: Sequence[Any]) -> NDArray[np.int64]:
    # A bool is an int in Python, but no count.
    if not (set(map(type, values)) <= {int} and min(values, default=0) >= 0 and max(values, default=0) <= MOST_COUNT):
        raise ValueError(f"shards: a value of {name} is no count")
    if sum(values) > MOST_COUNT:
        raise ValueError(f"its {name} add up to more than can be")
    return np.array(values, dtype=np.int64)


def check_inside(file: Any) -> None:
    """Raise `ValueError` for a name of a file that is not below the cache's folder."""
    if type(file) is str and len(file) <= MOST_NAME and _PLAIN.fullmatch(file):
        return
    path = PurePosixPath(str(file)[: MOST_NAME + 1])
    outside = path.is_absolute() or ".." in path.parts or not path.parts
    # One name a file: `a//b` and `./a` are others for the file `a/b`.
    if type(file) is not str or outside or path.as_posix() != file or "\\" in file or not file.isprintable():
        raise ValueError(f"it names {str(file)[:200]!r}, which is outside the cache or no plain name")


def file_info(folder: Path, path: Path) -> FileInfo:
    """Size and digest of a file of the cache at `folder`."""
    return FileInfo(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path))
