"""Lists of a cache's folder hold all that lies in it, however deep, and name what cannot be listed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.deep_folders import nest, remove
from cache.golden_caches import ALIGNED, GOLDEN
from teachercache.cache import Cache, verify
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.files.listing import files_below


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Path]:
    folder = Path(shutil.copytree(GOLDEN / "v2" / ALIGNED, tmp_path / "cache"))
    yield folder
    remove(folder)


@pytest.mark.parametrize("place", ["signatures", "alignments/zz", "teacher/deep", ".work"])
def test_folders_without_end_are_a_problem(copied: Path, place: str) -> None:
    nest(copied / place)
    [problem] = verify(copied, quick=True)
    assert problem.file.startswith(f"{place}/a/a/a") and "\n" not in problem.reason
    assert len(CacheAlignment.all_of(Cache.open(copied))) == 1


def test_everything_but_folders_is_listed(tmp_path: Path) -> None:
    for name in ("b/c", "b.c", "a/b/c", "a/b.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "a" / "pipe")
    found = files_below(tmp_path)
    assert found == {"a/b/c": 5, "a/b.c": 5, "a/pipe": -1, "b/c": 3, "b.c": 3, "link": -1}
    assert list(found) == ["a/b/c", "a/b.c", "a/pipe", "b/c", "b.c", "link"]
    assert list(files_below(tmp_path, "a")) == ["a/b/c", "a/b.c", "a/pipe"]
    assert files_below(tmp_path, "nowhere") == files_below(tmp_path, "b.c") == {}
