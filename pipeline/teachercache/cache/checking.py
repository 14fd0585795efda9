"""Checks of many files and rows at once, and who is told of them while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from teachercache.cache.files.column_groups import Group
from teachercache.cache.files.entries import FileInfo, ShardInfo
from teachercache.cache.problem import Problem
from teachercache.cache.row_values import wrong_rows
from teachercache.cache.storage.source import manifest_of

FILES_AT_ONCE = 1024  # checks that wait for a thread


@dataclass(frozen=True)
class Expected:
    """A file that a manifest lists; of a shard's, its group and how many rows and positions it has."""

    info: FileInfo
    group: Group | None = None
    shard: ShardInfo | None = None


class Progress(Protocol):
    """Listener of a check while it runs."""

    def begin(self, what: str, total: int) -> None:
        """`total` of something, `bytes` or `rows`, are to be checked."""

    def advance(self, count: int) -> None:
        """So many more are checked."""


class NoProgress:
    """Tells nobody."""

    def begin(self, what: str, total: int) -> None:
        """Does nothing."""

    def advance(self, count: int) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class Checks:
    """Several checks at a time, and who is told of them."""

    workers: int
    progress: Progress

    def of_files(
        self, files: Iterable[Expected], why: Callable[[Expected], str | None]
    ) -> Iterator[tuple[FileInfo, str | None]]:
        """Each file with what is wrong with it, in their order."""
        everything = list(files)
        with ThreadPoolExecutor(self.workers) as pool:
            for start in range(0, len(everything), FILES_AT_ONCE):
                some = everything[start : start + FILES_AT_ONCE]
                for expected, reason in zip(some, pool.map(why, some), strict=True):
                    self.progress.advance(expected.info.bytes)
                    yield expected.info, reason

    def of_rows(self, location: str | Path) -> list[Problem]:
        """Problems of rows."""
        self.progress.begin("rows", manifest_of(location).rows)
        return list(wrong_rows(location, workers=self.workers, on_checked=self.progress.advance))
