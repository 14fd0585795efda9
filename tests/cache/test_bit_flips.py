"""Random damage, wherever it is: no row of a shard with another byte in it is ever handed out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.bit_flips import CONSUMERS, measure
from teachercache.cache import Cache, verify
from teachercache.cache.manifest.manifest import MANIFEST, read_manifest
from teachercache.errors import CacheDamaged, CacheError

from builders import tiny_cache

FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def copied(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("copied") / "cache"))


def _flipped(data: bytes, flips: list[tuple[float, int]]) -> bytes:
    damaged = bytearray(data)
    for where, mask in flips:
        damaged[int(where * len(data))] ^= mask
    return bytes(damaged)


@settings(max_examples=60, deadline=None)
@given(flips=FLIPS, cut=st.integers(0, 3))
def test_whatever_happens_to_a_shard_is_found(
    made: Path, copied: Path, flips: list[tuple[float, int]], cut: int
) -> None:
    name = Cache.open(made).manifest.shards[1].file
    whole = (made / name).read_bytes()
    damaged = _flipped(whole, flips)[: len(whole) - cut]
    (copied / name).write_bytes(damaged)
    cache = Cache.open(copied)
    row = cache.manifest.shards[0].rows - cache.manifest.shards[0].held_out_rows  # the first one of the second shard
    if damaged == whole:  # the flips cancelled each other
        assert cache.read_row("train", row).row.positions
        return
    for _ in range(2):  # not only at the first attempt
        with pytest.raises(CacheDamaged, match=name):
            cache.read_row("train", row)
    assert [problem.file for problem in verify(copied)] == [name]


@settings(max_examples=100, deadline=None)
@given(flips=FLIPS)
def test_whatever_happens_to_a_manifest_is_found_or_changes_nothing(
    made: Path, copied: Path, flips: list[tuple[float, int]]
) -> None:
    (copied / MANIFEST).write_bytes(_flipped((made / MANIFEST).read_bytes(), flips))
    try:
        manifest = read_manifest(copied)
    except (CacheDamaged, CacheError) as error:
        assert "\n" not in str(error)
    else:
        assert manifest == read_manifest(made)  # a space that became a tab


@pytest.mark.parametrize("flips", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_single_bits_are_found_by_whoever_reads_them(tmp_path: Path, flips: int) -> None:
    """In any file with a digest; what does not read it comes out as if nothing had happened."""
    names = ["verify", *CONSUMERS] if flips > 6 else ["verify", "training", "evaluation", "alignment"]
    measured = measure(tmp_path, flips=flips, names=names)
    assert measured["missed"] == []
    assert measured["counts"]["verify"]["found"] == flips
    assert sum(counts["found"] for name, counts in measured["counts"].items() if name != "verify") > 0
