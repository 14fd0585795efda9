"""The corpus, counted: partitions, read by whoever has time, and the units that they are cut into.

What is kept of it lies on one shelf: `partitions.json`, `units.arrow`, `repeats.arrow`, the sample for calibration, and the
documents themselves where nobody could read the source again. Reading a unit seeks to its place in the source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import numpy as np

from teachercache.config import CorpusConfig
from teachercache.corpus.documents import Document, document_of
from teachercache.corpus.partitions import PARTITION_BYTES, Partition, Place, partitions_of
from teachercache.corpus.readers import read_rows
from teachercache.errors import CorpusError
from teachercache.precompute.planning.each import Each, in_turn
from teachercache.precompute.planning.repeats import Repeats, find_repeats
from teachercache.precompute.planning.row_table import Counting, count_partition
from teachercache.precompute.planning.sample import Sampled, SampleSize, smallest_of
from teachercache.precompute.planning.shelf import Shelf
from teachercache.precompute.planning.staged import read_documents, rows_of, stage, write_documents
from teachercache.precompute.planning.unit_table import COLUMNS, Cut, Cutting, UnitSize, cut_partition

UNITS_A_PARTITION = 16  # at least: the last unit of each is not full
PARTITIONS, UNITS, REPEATS, SAMPLE = "partitions.json", "units.arrow", "repeats.arrow", "sample.jsonl.zst"
DOCUMENTS, TABLES = "documents", "tables"  # folders


@dataclass(frozen=True)
class Counts:
    """Result of a pass over the corpus. `digest` covers id, occurrence and problem of each document, in order: that of the
    only partition, or one over those of all."""

    units: int
    rows_in: int
    deduplicated: int
    digest: str


def count_corpus(
    corpus: CorpusConfig,
    size: UnitSize,
    shelf: Shelf,
    *,
    calibration_positions: int = 0,
    each: Each = in_turn,
    partition_bytes: int = PARTITION_BYTES,
) -> Counts:
    """Read the corpus once, cut it into units, and put what is needed to read these on the shelf, with a sample that
    holds text for so many positions. Partitions are larger than `partition_bytes` where few units would fill them.

    Raises `CorpusError` when the corpus cannot be read or holds no row.
    """
    rows = read_rows(corpus)  # looks at the first ones
    most = max(partition_bytes, UNITS_A_PARTITION * size.bytes)
    partitions = partitions_of(corpus, partition_bytes=most)
    if partitions is None:
        partitions = [*stage(rows, corpus, shelf.below(DOCUMENTS), partition_bytes=most)]
    tables = shelf.below(TABLES)
    wanted = SampleSize.of(calibration_positions)
    share = wanted.share(len(partitions))
    work = [Counting(number, partition, corpus, tables, share) for number, partition in enumerate(partitions)]
    counted = [*each(count_partition, work)]
    rows_in = sum(part.rows for part in counted)
    repeats = find_repeats(tables, partitions=len(partitions), rows=rows_in, each=each)
    cutting = [
        Cutting(number, tables, *repeats.of(number), corpus.deduplicate, size) for number in range(len(partitions))
    ]
    cuts = [*each(cut_partition, cutting)]
    tables.clear()
    sampled = _occurring((found for part in counted for found in part.sampled), repeats, corpus)
    write_documents(shelf, SAMPLE, smallest_of(sampled, wanted))
    _write(shelf, corpus, partitions, cuts, repeats)
    digests = [cut.digest for cut in cuts]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Counts(sum(cut.units.shape[1] for cut in cuts), rows_in, sum(cut.duplicates for cut in cuts), digest)


def _occurring(sampled: Iterator[Sampled], repeats: Repeats, corpus: CorpusConfig) -> Iterator[Sampled]:
    """The sampled rows as the documents that they are in the whole corpus; without those that are dropped."""
    for found in sampled:
        occurrence = repeats.rank(found.partition, found.row)
        if not occurrence:
            yield found
        elif not corpus.deduplicate:
            document = dataclasses.replace(Document.from_json(found.line), occurrence=occurrence)
            yield dataclasses.replace(found, line=document.to_json())


def _write(shelf: Shelf, corpus: CorpusConfig, partitions: list[Partition], cuts: list[Cut], repeats: Repeats) -> None:
    written = {"corpus": corpus.model_dump(mode="json"), "partitions": [each.to_json() for each in partitions]}
    shelf.store.put(shelf.name(PARTITIONS), json.dumps(written).encode())
    units = np.concatenate([cut.units for cut in cuts], axis=1)
    shelf.write(UNITS, dict(zip(COLUMNS, units, strict=True)))
    names = ("partition", "row", "rank")
    shelf.write(REPEATS, dict(zip(names, dataclasses.astuple(repeats), strict=True)))


class CountedCorpus:
    """Units of a corpus that was counted."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        written = json.loads(shelf.store.get(shelf.name(PARTITIONS)))
        self._corpus = CorpusConfig.model_validate(written["corpus"])
        self._partitions: list[dict[str, Any]] = written["partitions"]
        self._units = shelf.read(UNITS)

    @cached_property
    def _repeats(self) -> Repeats:
        columns = self._shelf.read(REPEATS)
        return Repeats(*(columns[name].to_numpy() for name in ("partition", "row", "rank")))

    def __len__(self) -> int:
        return len(self._units)

    def documents(self, unit: int) -> list[Document]:
        """The documents of a unit, read from their source. Raises `CorpusError` where that has changed since it was counted."""
        at = {name: self._units[name][unit].as_py() for name in COLUMNS}
        partition = Partition.from_json(self._partitions[at["partition"]])
        place = Place(at["span"], at["passed"], at["byte"])
        rows = islice(rows_of(partition, self._corpus, store=self._shelf.store, start=place), at["rows"])
        rank = self._repeats.within(at["partition"], at["first"], at["first"] + at["rows"])
        found = []
        for number, (*_, values) in enumerate(rows, start=at["first"]):
            document = values if isinstance(values, Document) else document_of(values, self._corpus)
            if number not in rank:
                found.append(document)
            elif document.problem is not None or not self._corpus.deduplicate:
                found.append(dataclasses.replace(document, occurrence=rank[number]))
        check = sum(int(document.source_id[16:], 16) for document in found) % 2**64
        if (len(found), check) != (at["documents"], at["check"]):
            raise CorpusError(
                f"corpus {self._corpus.source} is not what it was when this job began (rows from number {at['first']} on in "
                f"{', '.join(sorted({span.path for span in partition.spans})[:3])}); put it back, or delete the cache's "
                "folder and run this command again"
            )
        return found

    def sample(self) -> list[Document]:
        """Documents drawn from the whole corpus by content hash; held-out ones are never among them."""
        return read_documents(self._shelf, SAMPLE)


@lru_cache(maxsize=2)
def counted_corpus(shelf: Shelf) -> CountedCorpus:
    """The corpus that was counted to this shelf, which one process reads once: each count has a shelf of its own."""
    return CountedCorpus(shelf)
