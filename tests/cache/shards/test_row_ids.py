"""The digest of a shard's rows is held against them, before any of them is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from cache.forgery import Data, sign
from cache.golden_caches import ALIGNED, GOLDEN
from teachercache.cache import SPLITS, Cache, verify
from teachercache.cache.files.entries import FileInfo, ShardInfo
from teachercache.cache.row_keys import row_keys
from teachercache.cache.shards.shard import Shard
from teachercache.errors import CacheDamaged

OTHER = "it holds other rows than row_ids in the index says"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "v2" / ALIGNED, tmp_path / "cache"))


def swap_row_ids(data: Data) -> None:
    first, second = data["shards"][:2]
    first["row_ids"], second["row_ids"] = second["row_ids"], first["row_ids"]


@pytest.mark.parametrize("quick", [False, True])
def test_rows_that_are_not_those_of_the_index_are_refused(copied: Path, quick: bool) -> None:
    shutil.rmtree(copied / "alignments")
    sign(copied, swap_row_ids)
    cache = Cache.open(copied)
    for _ in range(2):  # nothing stays open of a shard that was refused
        with pytest.raises(CacheDamaged, match=rf"shards/part-00000-\S* cannot be trusted: {OTHER}[^\n]*$"):
            cache.read_row("train", 0)
    assert cache.read_row("train", cache.rows_of("train") - 1).row.positions  # another shard
    files = [info.file for shard in cache.infos[:2] for info in shard.files.values()]
    problems = verify(copied, quick=quick)
    assert [problem.file for problem in problems] == files and all(OTHER in problem.reason for problem in problems)


def test_files_of_other_groups_hold_the_same_rows(copied: Path) -> None:
    shutil.rmtree(copied / "alignments")
    rows = Cache.open(copied).infos.counted("rows").tolist()
    one, other = next((i, j) for i in range(len(rows)) for j in range(i) if rows[i] == rows[j])

    def swap(data: Data) -> None:
        left, right = (data["shards"][number]["files"] for number in (one, other))
        left["targets/hidden"], right["targets/hidden"] = right["targets/hidden"], left["targets/hidden"]

    sign(copied, swap)
    problems = verify(copied)
    assert len(problems) == 2 and all(OTHER in problem.reason for problem in problems)
    assert all(problem.file.startswith("targets/hidden/") for problem in problems)


class Watched(Cache):
    """Notes which shards are opened, and which of them are held against their digest."""

    opened_files: list[str]
    checked_files: list[str]

    def opened(self, info: ShardInfo, mapped: Callable[[FileInfo], pa.MemoryMappedFile]) -> Shard:
        shard = super().opened(info, mapped)
        check = shard.check_row_ids

        def noted() -> None:
            self.checked_files.append(info.file)
            check()

        shard.check_row_ids = noted  # type: ignore[method-assign]
        self.opened_files.append(info.file)
        return shard


def test_each_shard_is_held_against_it_once() -> None:
    cache = Watched.open(GOLDEN / "v2" / ALIGNED)
    assert isinstance(cache, Watched)
    cache.opened_files, cache.checked_files = [], []
    for _ in range(2):
        for split in SPLITS:
            for index in range(cache.rows_of(split)):
                cache.read_row(split, index)
        cache._shards.clear()  # as where a cache has more shards than stay open
    names = sorted(info.file for info in cache.infos)
    assert sorted(cache.checked_files) == names and sorted(cache.opened_files) == sorted(2 * names)
    assert sum(map(len, row_keys(cache).values())) == cache.manifest.rows
