"""A corpus in partitions and units: the same documents as one pass over all of its rows, whatever its parts are."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teachercache.cache.stores.local import LocalStore
from teachercache.config import CorpusConfig
from teachercache.corpus.documents import Document, Duplicate, documents
from teachercache.corpus.readers import read_rows
from teachercache.errors import CorpusError
from teachercache.precompute.planning.counted import CountedCorpus, Counts, count_corpus
from teachercache.precompute.planning.shelf import Shelf
from teachercache.precompute.planning.unit_table import UnitSize

SIZE = UnitSize(rows=7, bytes=900)
PARTS = 1500  # bytes of a partition, where there are to be many


@dataclasses.dataclass
class OnePass:
    """Result of a single pass over a corpus: the plain twin of `count_corpus`."""

    units: list[list[Document]]
    counts: Counts


def one_pass(config: CorpusConfig, size: UnitSize) -> OnePass:
    items = [*documents(read_rows(config), config)]
    kept = [item for item in items if isinstance(item, Document)]
    digest, units, filled = hashlib.sha256(), list[list[Document]](), 0
    for document in kept:
        if not units or len(units[-1]) >= size.rows or filled >= size.bytes:
            units.append([])
            filled = 0
        units[-1].append(document)
        filled += len(document.to_json()) + 1
        digest.update(f"{document.source_id} {document.occurrence} {document.problem}\n".encode())
    duplicates = sum(isinstance(item, Duplicate) for item in items)
    return OnePass(units, Counts(len(units), len(items), duplicates, digest.hexdigest()))


def texts(count: int = 160) -> list[Any]:
    """Texts of many lengths with repetitions, near and far, and rows that cannot be used."""
    rng = random.Random(7)
    words = ["tree", "über", "naïve\t", "東京", '"quoted"', "🙂", "and"]
    found: list[Any] = [" ".join(rng.choices(words, k=rng.randint(1, 40))) + f" {number}" for number in range(count)]
    found[20:20] = [found[3], found[19], "", "  \n", 7, None, found[3]]
    return [*found, found[5], found[3], "", 7]


def as_lines(folder: Path) -> str:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts()]
    lines[30:30] = ["", "no json", '{"texd": "wrong"}', "  ", "no json"]
    for name, part in (("a", lines[:100]), ("b", lines[100:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + ("\n" if name == "a" else ""), encoding="utf-8")
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "a.jsonl").read_bytes())
    return str(folder)


def as_compressed_lines(folder: Path) -> str:
    for number in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts()[number * 60 : number * 60 + 60])
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return str(folder)


def as_parquet(folder: Path) -> str:
    rows = [text if isinstance(text, str) else None for text in texts()]
    for number in range(2):
        part = rows[number * 80 : number * 80 + 90]
        table = pa.table({"number": range(len(part)), "text": part})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=17)
    return str(folder)


def as_texts(folder: Path) -> str:
    for number, text in enumerate(text for text in texts(60) if isinstance(text, str)):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    (folder / "900.txt").write_bytes(b"\xff\xfe no text")
    return str(folder)


def as_saved_dataset(folder: Path) -> str:
    from datasets import Dataset

    Dataset.from_dict({"text": [str(text) for text in texts()]}).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_chats(folder: Path) -> str:
    rows = [[{"role": "user", "content": str(text)}, {"role": "assistant", "content": "Yes."}] for text in texts(60)]
    lines = [json.dumps({"messages": row}) + "\n" for row in [*rows, rows[4], "none", []]]
    (folder / "chats.jsonl").write_text("".join(lines))
    return str(folder / "chats.jsonl")


CORPORA: dict[str, tuple[Callable[[Path], str], dict[str, Any]]] = {
    "lines": (as_lines, {}),
    "lines, repeated rows kept": (as_lines, {"deduplicate": False}),
    "lines, a limit": (as_lines, {"limit": 77}),
    "lines, slices": (as_lines, {"split": "train[:30%]+train[80:150]"}),
    "compressed lines": (as_compressed_lines, {}),
    "compressed lines, slices": (as_compressed_lines, {"split": "train[10:70]"}),
    "Parquet": (as_parquet, {}),
    "Parquet, repeated rows kept": (as_parquet, {"deduplicate": False, "held_out": 0.5}),
    "Parquet, a limit": (as_parquet, {"limit": 100}),
    "Parquet, slices": (as_parquet, {"split": "train[-50:]+train[:5]"}),
    "texts": (as_texts, {}),
    "chats": (as_chats, {"messages_field": "messages"}),
    "a saved dataset": (as_saved_dataset, {}),
    "CPython's documentation": (lambda folder: "python-docs", {"limit": 30}),
}


@pytest.fixture(params=CORPORA)
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> CorpusConfig:
    make, settings = CORPORA[request.param]
    (tmp_path / "corpus").mkdir()
    return CorpusConfig(source=make(tmp_path / "corpus"), **{"held_out": 0.2, **settings})


def counted(corpus: CorpusConfig, folder: Path, size: UnitSize = SIZE, **options: Any) -> tuple[Counts, CountedCorpus]:
    shelf = Shelf(LocalStore(folder), "corpus")
    return count_corpus(corpus, size, shelf, **options), CountedCorpus(shelf)


def test_one_partition_is_one_pass(tmp_path: Path, corpus: CorpusConfig) -> None:
    wanted = one_pass(corpus, SIZE)
    counts, found = counted(corpus, tmp_path / "work")
    assert counts == wanted.counts
    assert [found.documents(unit) for unit in range(len(found))] == wanted.units


def test_many_partitions_hold_the_same_documents(tmp_path: Path, corpus: CorpusConfig) -> None:
    """Repetitions are found across all of them, and counted as in one pass; read in any order, by anyone."""
    wanted = one_pass(corpus, SIZE)
    size = UnitSize(SIZE.rows, PARTS // 16)
    counts, found = counted(corpus, tmp_path / "work", size, partition_bytes=PARTS, each=backwards)
    units = {unit: found.documents(unit) for unit in reversed(range(len(found)))}
    assert [placeless(document) for unit in range(len(found)) for document in units[unit]] == [
        placeless(document) for unit in wanted.units for document in unit
    ]
    assert (counts.rows_in, counts.deduplicated) == (wanted.counts.rows_in, wanted.counts.deduplicated)
    assert found.sample() == counted(corpus, tmp_path / "one")[1].sample()


def placeless(document: Document) -> Document:
    """In the middle of a file of lines they are counted from there."""
    problem = document.problem and re.sub(r"line \d+( after byte \d+)?", "a line", document.problem)
    return dataclasses.replace(document, problem=problem)


def backwards(work: Callable[[Any], Any], items: Sequence[Any], /) -> Iterator[Any]:
    """Work done in another order than its results are asked for."""
    return reversed([work(item) for item in reversed(items)])


def test_there_are_many(tmp_path: Path) -> None:
    for make in (as_lines, as_parquet, as_texts, as_compressed_lines):
        folder = tmp_path / make.__name__
        folder.mkdir()
        corpus = CorpusConfig(source=make(folder))
        counted(corpus, tmp_path / "work", UnitSize(7, PARTS // 16), partition_bytes=PARTS)
        partitions = json.loads((tmp_path / "work" / "corpus" / "partitions.json").read_text())["partitions"]
        assert len(partitions) >= 3, make.__name__


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    """The same rows from another format, as long as they are one partition."""
    rows = [text for text in texts() if isinstance(text, str)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    pq.write_table(pa.table({"text": rows}), tmp_path / "rows.parquet")
    digests = {
        counted(CorpusConfig(source=str(tmp_path / name)), tmp_path / f"work-{name}")[0].digest
        for name in ("rows.jsonl", "rows.parquet")
    }
    assert len(digests) == 1


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {number:03d}"}) + "\n" for number in range(30)))
    _, found = counted(CorpusConfig(source=str(file)), tmp_path / "work")
    before = found.documents(2)
    file.write_text(file.read_text().replace("row 002", "row 902"))
    assert found.documents(2) == before
    with pytest.raises(CorpusError, match=r"is not what it was when this job began .*rows\.jsonl.*; put it back"):
        found.documents(0)


def test_an_empty_corpus_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(CorpusError, match="holds no rows"):
        counted(CorpusConfig(source=str(tmp_path / "rows.jsonl")), tmp_path / "work")
