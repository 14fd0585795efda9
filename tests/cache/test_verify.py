"""Several checks at a time find what one after the other does, and say how far they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cache.forgery import payload, rewrite
from teachercache.cache import Cache, verify
from teachercache.cache.manifest.manifest import read_manifest

from builders import aligned, other_student, sentences, tiny_cache


class Told:
    """Keeps what a check says of itself."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.counts: dict[str, int] = {}

    def begin(self, what: str, total: int) -> None:
        self.now = what
        self.totals[what] = self.totals.get(what, 0) + total
        self.counts.setdefault(what, 0)

    def advance(self, count: int) -> None:
        self.counts[self.now] += count


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    logits = {"kind": "top-k", "k": 8}
    cache = tiny_cache(tmp_path / "cache", texts=sentences(24), targets={"logits": logits})
    aligned(cache, other_student(tmp_path / "student"))
    return cache


@pytest.mark.parametrize("quick", [False, True])
def test_files_that_are_checked_at_the_same_time_are_told_in_order(folder: Path, quick: bool) -> None:
    listed = [info.file for info in read_manifest(folder).all_files]
    (folder / listed[0]).unlink()
    (folder / listed[1]).write_bytes(b"less")
    [alignment] = sorted((folder / "alignments").rglob("*.arrow"))[:1]
    alignment.write_bytes(alignment.read_bytes() + b"more")
    (folder / "unlisted").touch()
    found = verify(folder, quick=quick)
    assert [problem.file for problem in found] == [*listed[:2], alignment.relative_to(folder).as_posix(), "unlisted"]
    assert verify(folder, quick=quick, workers=4) == found


def test_rows_that_are_checked_in_processes_are_told_in_order(folder: Path) -> None:
    shutil.rmtree(folder / "alignments")  # whose digests are of other bytes then
    cache = Cache.open(folder)
    first = cache.infos[0]
    twice = cache.read_row("train", first.rows - first.held_out_rows).row.row_id

    def edit(logits_NK: np.ndarray) -> np.ndarray:
        logits_NK[-1, -1] = np.nan
        return logits_NK

    payload(folder, "head_logits", edit)
    rewrite(folder, columns=lambda data: data["row_id"].__setitem__(1, twice))
    found = verify(folder, deep=True)
    assert len(found) > 1 and all(problem.file.startswith("row ") for problem in found)
    assert verify(folder, deep=True, workers=2) == found


@pytest.mark.parametrize("workers", [1, 2])
def test_it_says_how_far_it_is(folder: Path, workers: int) -> None:
    told, cache = Told(), Cache.open(folder)
    assert verify(folder, deep=True, workers=workers, progress=told) == []
    rows = cache.rows_of("train") + cache.rows_of("held-out")
    assert told.counts == told.totals and told.totals["rows"] == rows
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.name not in ("README.md", "manifest.json"))
    assert 0.5 * files < told.totals["bytes"] <= files
