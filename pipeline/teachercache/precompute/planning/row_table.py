"""Row tables: what is kept of a partition that was read once. No text but that of a few documents, for calibration.

In files, which are gone once units are cut: ids, sorted, so that equal ones of all partitions meet (repeats.py), and beside
them the size of each row's document and its place.

Shapes: N rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii

import numpy as np
import pyarrow as pa

from teachercache.config import CorpusConfig
from teachercache.corpus.documents import Document, content_digest, document_of, usable_text
from teachercache.corpus.files import Row
from teachercache.corpus.partitions import Partition
from teachercache.precompute.planning.sample import Sampled, SampleSize, Smallest, salted_hash
from teachercache.precompute.planning.shelf import Shelf
from teachercache.precompute.planning.staged import rows_of
from teachercache.tokens.rows import is_held_out

# A text's document as one line of JSON, but for the text.
LINE_BYTES = len(Document("0" * 32, 0, held_out=False, text="").to_json()) + 1 - len('""')


@dataclass(frozen=True)
class Counting:
    """A partition to count: its number, and where its table goes."""

    number: int
    partition: Partition
    corpus: CorpusConfig
    tables: Shelf
    sample: SampleSize


@dataclass(frozen=True)
class RowCount:
    """Result of reading a partition, as the driver is told it."""

    rows: int
    sampled: list[Sampled]


@dataclass
class RowTable:
    """Rows of a partition in order: `bytes_N` of their documents as JSON lines, `places_N3` (see `Place`), and why some of them
    cannot be used."""

    ids: bytearray = field(default_factory=bytearray)  # 16 bytes each
    bytes_N: Sequence[int] = field(default_factory=lambda: array("Q"))
    places_N3: Sequence[int] = field(default_factory=lambda: array("Q"))  # one after the other
    problems: dict[int, str] = field(default_factory=dict)


def count_partition(work: Counting) -> RowCount:
    """Read a partition and write its table."""
    table, sample = RowTable(), Smallest(work.sample, once=work.corpus.deduplicate)
    sizes, places = array("Q"), array("Q")
    for row, (*place, values) in enumerate(rows_of(work.partition, work.corpus, store=work.tables.store)):
        digest, size, problem, document = _looked_at(values, work.corpus)
        table.ids += digest
        sizes.append(size)
        places.extend(place)
        if problem is not None:
            table.problems[row] = problem
        else:
            _offer(sample, row, digest.hex(), document or values, work.corpus)
    table.bytes_N, table.places_N3 = sizes, places
    _write(table, work.tables, work.number)
    return RowCount(len(sizes), sample.sampled(work.number))


def _looked_at(values: Row | Document, corpus: CorpusConfig) -> tuple[bytes, int, str | None, Document | None]:
    """Id, size as a line of JSON, and problem of a row; its document, where one had to be made."""
    text = None if isinstance(values, Document) else usable_text(values, corpus)
    if text is None:
        document = values if isinstance(values, Document) else document_of(values, corpus)
        return bytes.fromhex(document.source_id), len(document.to_json()) + 1, document.problem, document
    digest = content_digest(text)
    held_out = is_held_out(digest.hex(), corpus.held_out)
    return digest, LINE_BYTES + len(encode_basestring_ascii(text)) - held_out, None, None


def _offer(sample: Smallest, row: int, source_id: str, values: Row | Document, corpus: CorpusConfig) -> None:
    place = int(salted_hash(source_id), 16)
    if not sample.wants(place):
        return
    document = values if isinstance(values, Document) else document_of(values, corpus)
    if not document.held_out:
        sample.add(place, row, document.to_json())


def _write(table: RowTable, tables: Shelf, number: int) -> None:
    ids_N2 = np.frombuffer(bytes(table.ids), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    order_N = np.lexsort((ids_N2[:, 1], ids_N2[:, 0]))
    places_N3 = np.frombuffer(table.places_N3, dtype=np.uint64).reshape(-1, 3)  # type: ignore[call-overload]
    problems = pa.nulls(len(order_N), pa.string())
    if table.problems:
        problems = pa.array([table.problems.get(row) for row in range(len(order_N))], pa.string())
    ids = {"high": ids_N2[order_N, 0], "low": ids_N2[order_N, 1], "row": order_N.astype(np.uint32)}
    rows = {
        "bytes": np.frombuffer(table.bytes_N, dtype=np.uint64),  # type: ignore[call-overload]
        **{name: places_N3[:, column] for column, name in enumerate(("span", "passed", "byte"))},
    }
    tables.write(ids_name(number), ids)
    tables.write(rows_name(number), {**rows, "problem": problems}, codec="zstd")


def ids_name(number: int) -> str:
    """Ids of a partition, sorted; its halves as numbers, and the row of each."""
    return f"{number:06d}.ids.arrow"


def rows_name(number: int) -> str:
    """The other columns, in the order of rows."""
    return f"{number:06d}.rows.arrow"
