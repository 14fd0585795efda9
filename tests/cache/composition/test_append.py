"""Rows added to a cache in place: what was there stays as it was, and is found under its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cache.composition.composed import assert_same_row, rows_of
from cache.golden_caches import reading
from teachercache.cache import Cache, verify
from teachercache.cache.composition.append import appended
from teachercache.cache.manifest.manifest import read_manifest
from teachercache.cache.manifest.snapshots import named, parted, replace_manifest
from teachercache.cache.stores.local import LocalStore
from teachercache.errors import CacheDamaged, CacheError

from builders import sentences, tiny_cache, tiny_teacher
from s3_server import Server

TOP_K = {"logits": {"kind": "top-k", "k": 4}}
TEXTS = sentences(40, seed=2)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parents")
    teacher = tiny_teacher(folder / "teacher")
    first, second = (
        tiny_cache(folder / name, teacher=teacher, texts=texts, targets=TOP_K)
        for name, texts in {"first": [*TEXTS[:22], ""], "second": ["  ", *TEXTS[22:]]}.items()
    )
    return first, second


@pytest.fixture
def grown(parents: tuple[Path, Path], tmp_path: Path) -> tuple[Path, str]:
    """A cache with rows of two, and its fingerprint of before."""
    folder = Path(shutil.copytree(parents[0], tmp_path / "grown"))
    cache = Cache.open(folder)
    manifest = appended(cache, Cache.open(parents[1]), lambda: None, by="grow")
    replace_manifest(manifest, LocalStore(folder), before=cache.manifest)
    return folder, cache.manifest.fingerprint


def test_the_cache_has_both_and_its_own_files_as_they_were(parents: tuple[Path, Path], grown: tuple[Path, str]) -> None:
    folder, before = grown
    first, second, found = rows_of(parents[0]), rows_of(parents[1]), rows_of(folder)
    assert found.keys() == first.keys() | second.keys() and verify(folder, deep=True) == []
    for row_id, stored in found.items():
        assert_same_row(stored, first.get(row_id) or second[row_id])
    ours, whole = Cache.open(parents[0]).manifest, Cache.open(folder).manifest
    assert list(whole.shards)[: len(ours.shards)] == list(ours.shards)
    assert whole.parents[0]["fingerprint"] == before != whole.fingerprint
    assert (whole.audit.rows_in, whole.audit.quarantined, whole.audit.stored) == (42, 2, 40)
    sizes = [Cache.open(path).manifest.column_bytes for path in parents]
    assert whole.column_bytes == {name: size + sizes[1][name] for name, size in sizes[0].items()}


def test_the_cache_of_before_is_read_by_its_fingerprint(parents: tuple[Path, Path], grown: tuple[Path, str]) -> None:
    folder, before = grown
    wanted = reading(Cache.open(parents[0]))
    for opened in (
        Cache.open(f"{folder}@{before}"),
        Cache.open(Path(f"{folder}@{before[:12]}")),
        Cache.open(folder, as_of=before),
    ):
        assert opened.is_snapshot and reading(opened) == wanted
    now = Cache.open(folder)
    assert not now.is_snapshot and Cache.open(folder, as_of="0" * 64).manifest.fingerprint == now.manifest.fingerprint
    assert not Cache.open(f"{folder}@{now.manifest.fingerprint}").is_snapshot


def test_a_snapshot_in_an_object_store_too(parents: tuple[Path, Path], grown: tuple[Path, str], s3: Server) -> None:
    folder, before = grown
    url = s3.upload(folder, "grown/cache")
    assert reading(Cache.open(f"{url}@{before[:16]}")) == reading(Cache.open(parents[0]))
    assert Cache.open(url).manifest.rows == Cache.open(folder).manifest.rows


def test_a_snapshot_that_is_not_there_or_is_another_ones_is_refused(grown: tuple[Path, str]) -> None:
    folder, before = grown
    with pytest.raises(CacheError, match=rf"keeps no manifest 000000000000 \(it keeps: {before[:12]}\)"):
        Cache.open(f"{folder}@{'0' * 12}")
    kept = folder / "snapshots" / before
    kept.rename(kept.with_name("1" * 64))
    with pytest.raises(CacheDamaged, match=r"is of another cache .*; delete snapshots/1111"):
        Cache.open(f"{folder}@{'1' * 12}")
    manifest = kept.with_name("1" * 64) / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"by"', '"at"').replace("tiny", "TINY").replace("corpus.jsonl", "c.jsonl")
    )
    with pytest.raises(CacheDamaged, match="its digest does not match"):
        Cache.open(f"{folder}@{'1' * 12}")
    assert read_manifest(folder).rows


def test_names_of_snapshots(tmp_path: Path) -> None:
    fingerprint = "0123456789abcdef" * 4
    assert parted(f"s3://bucket/cache@{fingerprint}") == ("s3://bucket/cache", fingerprint)
    assert parted(Path("caches/a@0123456789ab")) == (Path("caches/a"), "0123456789ab")
    assert parted("caches/a@home") == ("caches/a@home", None)
    (tmp_path / "a@0123456789ab").mkdir()
    assert parted(tmp_path / "a@0123456789ab")[1] is None  # a folder that is called so
    assert named(f"caches/a@{'1' * 12}", fingerprint) == f"caches/a@{fingerprint}"


def test_rows_of_other_settings_are_not_added(parents: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parents[0], tmp_path / "cache"))
    other = tiny_cache(tmp_path / "other", texts=TEXTS[30:], targets=TOP_K, sequence={"length": 20})
    with pytest.raises(CacheError, match=r"settings.sequence.length is 20, not 48"):
        appended(Cache.open(folder), Cache.open(other), lambda: None, by="grow")
    assert verify(folder) == []
