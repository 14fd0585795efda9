"""The sample that calibration draws from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teachercache.cache.stores.local import LocalStore
from teachercache.config import CorpusConfig
from teachercache.precompute.planning.counted import CountedCorpus, count_corpus
from teachercache.precompute.planning.sample import SAMPLED_BYTES, SAMPLED_DOCUMENTS
from teachercache.precompute.planning.shelf import Shelf
from teachercache.precompute.planning.unit_table import UnitSize


def sampled(folder: Path, texts: list[str], *, positions: int = 0) -> list[str]:
    """Texts of the documents that are kept for calibration, in their order."""
    corpus, shelf = folder / "corpus.jsonl", Shelf(LocalStore(folder / "cache"), "corpus")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = CorpusConfig(source=str(corpus), held_out=0)
    count_corpus(config, UnitSize(1024, 2**22), shelf, calibration_positions=positions)
    return [document.text or "" for document in CountedCorpus(shelf).sample()]


def test_short_documents_are_sampled_until_they_hold_enough(tmp_path: Path) -> None:
    texts = [f"A note, number {number}." for number in range(3000)]
    assert sorted(sampled(tmp_path, texts)) == sorted(texts)  # far below SAMPLED_BYTES: all of them


@pytest.mark.parametrize("size", [1_000, 20_000])
def test_longer_ones_until_there_are_enough_of_them_and_of_their_bytes(tmp_path: Path, size: int) -> None:
    texts = [f"{number} {'word ' * (size // 5)}" for number in range(3000 if size == 1_000 else 700)]
    kept = sampled(tmp_path, texts)
    if size == 20_000:
        assert len(kept) == SAMPLED_DOCUMENTS
    else:
        assert SAMPLED_DOCUMENTS < len(kept) < len(texts)
        assert SAMPLED_BYTES * 0.7 < sum(map(len, kept)) < SAMPLED_BYTES * 1.1  # of text; a line holds more than that


def test_a_larger_calibration_draws_from_more(tmp_path: Path) -> None:
    texts = [f"{number} {'word ' * 200}" for number in range(4000)]
    kept = sampled(tmp_path, texts, positions=50_000)
    assert 50_000 * 64 * 0.7 < sum(map(len, kept)) < 50_000 * 64 * 1.1


def test_the_order_of_the_corpus_changes_nothing(tmp_path: Path) -> None:
    texts = [f"{number} {'word ' * 1000}" for number in range(1200)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert sampled(tmp_path / "a", texts) == sampled(tmp_path / "b", texts[::-1])
