"""Alignments of a cache that has grown: those of before serve whom they served, and `align` adds what they lack."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from teachercache.cache import Cache, verify
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.composition.append import appended
from teachercache.cache.manifest.snapshots import replace_manifest
from teachercache.cache.stores.local import LocalStore
from teachercache.errors import CacheError
from teachercache.models.loading import load_tokenizer
from teachercache.precompute.align.job import run_align
from teachercache.tokens.fingerprint import tokenizer_fingerprint

from builders import aligned, other_student, sentences, tiny_cache, tiny_teacher

TOP_K = {"logits": {"kind": "top-k", "k": 4}}
TEXTS = sentences(40, seed=2)


def alignment_of(location: Path | str, fingerprint: str) -> CacheAlignment:
    return CacheAlignment.open(Cache.open(location), fingerprint, student="the student")


def rows_read(location: Path | str, fingerprint: str) -> int:
    """Number of the rows of an alignment, each read with that of the cache."""
    cache, alignment = Cache.open(location), alignment_of(location, fingerprint)
    for index in range(cache.rows_of("train")):
        alignment.aligned_row("train", index, cache.read_row("train", index))
    return alignment.rows_of("train")


def test_an_alignment_of_before_is_made_whole_by_aligning_again(tmp_path: Path) -> None:
    teacher, student = tiny_teacher(tmp_path / "teacher"), other_student(tmp_path / "student")
    folder, more = (
        tiny_cache(tmp_path / name, teacher=teacher, texts=texts, targets=TOP_K)
        for name, texts in {"first": TEXTS[:22], "second": TEXTS[22:]}.items()
    )
    aligned(folder, student)
    reader = tokenizer_fingerprint(load_tokenizer(str(student)))
    before = Cache.open(folder)
    manifest = appended(before, Cache.open(more), lambda: None, by="grow")
    replace_manifest(manifest, LocalStore(folder), before=before.manifest)
    snapshot = f"{folder}@{before.manifest.fingerprint}"
    with pytest.raises(CacheError, match="lacks rows that the cache has by now; run `teachercache align` again"):
        alignment_of(folder, reader)
    assert CacheAlignment.all_of(Cache.open(folder)) == [] and verify(folder) == []
    assert rows_read(snapshot, reader) == before.rows_of("train")
    with pytest.raises(CacheError, match=f"is the cache as it was: align {folder}, which serves it too"):
        run_align(snapshot, student=str(student), console=Console(quiet=True))
    aligned(folder, student)
    assert rows_read(folder, reader) == Cache.open(folder).rows_of("train") > before.rows_of("train")
    assert rows_read(snapshot, reader) == before.rows_of("train")
    assert verify(folder, deep=True) == []
