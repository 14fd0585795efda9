"""A sample stands for its corpus, in every format, without reading all of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teachercache.config import CorpusConfig
from teachercache.corpus.readers import read_rows
from teachercache.corpus.sample import row_bytes, sample_corpus
from teachercache.errors import CorpusError

from builders import sentences

# Later texts are longer: a sample of the beginning alone would be wrong.
TEXTS = [text for words in (20, 40, 60, 80, 100) for text in sentences(200, seed=words, words=words)]
SMALL = 32 * 2**10  # bytes, of a corpus of 200 kB


def jsonl(folder: Path) -> Path:
    lines = [json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(TEXTS)]
    for name, part in (("a", lines[:350]), ("b", lines[350:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    return folder


def compressed(folder: Path) -> Path:
    for number in range(20):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[50 * number : 50 * (number + 1)]]
        with gzip.open(folder / f"{number:02}.jsonl.gz", "wt") as file:
            file.writelines(lines)
    return folder


def parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"text": TEXTS}), folder / "rows.parquet", row_group_size=75)
    return folder


def text(folder: Path) -> Path:
    for number, content in enumerate(TEXTS):
        (folder / f"{number:04}.txt").write_text(content)
    return folder


def saved(folder: Path) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


WRITERS = {each.__name__: each for each in (jsonl, compressed, parquet, text, saved)}


def text_bytes(rows: list) -> int:
    return sum(len(row["text"]) for row in rows)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_large_corpus_is_counted_from_a_part_of_it(tmp_path: Path, kind: str) -> None:
    config = CorpusConfig(source=str(WRITERS[kind](tmp_path)))
    sample = sample_corpus(config, whole_bytes=SMALL)
    rows = [row for block in sample.blocks for row in block.rows]
    assert not sample.is_whole and text_bytes(rows) < sum(map(len, TEXTS)) / 2
    assert sample.factor * text_bytes(rows) == pytest.approx(sum(map(len, TEXTS)), rel=0.15)
    assert sample.factor * len(rows) == pytest.approx(len(TEXTS), rel=0.15)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
@pytest.mark.parametrize("limits", [{"limit": 450}, {"split": "train[:50%]"}], ids=["limit", "split"])
def test_a_limit_or_a_slice_counts(tmp_path: Path, kind: str, limits: dict) -> None:
    config = CorpusConfig(source=str(WRITERS[kind](tmp_path)), **limits)
    sample = sample_corpus(config, whole_bytes=SMALL)
    rows = [row for block in sample.blocks for row in block.rows]
    wanted = [*read_rows(config)]
    assert sample.factor * len(rows) == pytest.approx(len(wanted), rel=0.3 if "split" in limits else 0.15)
    if "limit" in limits:
        assert sample.factor * text_bytes(rows) == pytest.approx(text_bytes(wanted), rel=0.15)


def test_a_small_corpus_is_read_whole(tmp_path: Path) -> None:
    config = CorpusConfig(source=str(jsonl(tmp_path)))
    sample = sample_corpus(config)
    assert sample.is_whole and sample.factor == 1
    [block] = sample.blocks
    assert block.rows == [*read_rows(config)]


def test_rows_larger_than_a_block_are_sampled_once_each(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} " * 9000}) + "\n" for number in range(12)))
    sample = sample_corpus(CorpusConfig(source=str(path)), whole_bytes=SMALL)
    assert sum(len(block.rows) for block in sample.blocks) * sample.factor == pytest.approx(12, rel=0.2)
    assert all(row_bytes(row) > SMALL / 3 for block in sample.blocks for row in block.rows)


def test_a_stream_of_unknown_length_asks_for_a_limit(tmp_path: Path) -> None:
    jsonl(tmp_path)
    streamed = CorpusConfig(source=str(tmp_path), format="datasets", streaming=True)
    with pytest.raises(CorpusError, match=r"does not say how many rows it has; .*corpus.limit"):
        sample_corpus(streamed, whole_bytes=SMALL)
    limited = sample_corpus(streamed.model_copy(update={"limit": 750}), whole_bytes=SMALL)
    assert limited.total == 750
