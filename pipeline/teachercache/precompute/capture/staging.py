"""The corpus as files of raw documents, one a work unit: what the job computes from, whatever happens to its source.

A unit is the same whenever it runs again, also from a streamed dataset. Staging costs one pass over the corpus and its
size in zstd, until the cache is committed.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from teachercache.cache.manifest.manifest import WORK_FOLDER
from teachercache.cache.stores.store import Store
from teachercache.config import CorpusConfig, PrecomputeConfig
from teachercache.corpus.documents import Document, Duplicate, documents
from teachercache.corpus.readers import read_rows
from teachercache.errors import CorpusError


@dataclass(frozen=True)
class Staged:
    """Result of a pass over the corpus; `digest` covers id, occurrence and problem of every document, in order."""

    units: int
    rows_in: int
    deduplicated: int
    held_out: int
    digest: str


# What calibration draws from: at least so many documents and bytes of them, unless that is more than memory should hold.
# Half of it is used; 32 bytes are more text than most tokens stand for.
SAMPLED_DOCUMENTS = 512
SAMPLED_BYTES = 2 * 2**20
BYTES_PER_CALIBRATION_POSITION = 2 * 32
MOST_SAMPLED_BYTES = 256 * 2**20


SAMPLE = f"{WORK_FOLDER}/sample.jsonl.zst"  # documents drawn from the whole corpus by content hash


def unit_name(unit: int) -> str:
    """File of a staged unit, in the cache's store."""
    return f"{WORK_FOLDER}/units/{unit:05d}.jsonl.zst"


def stage(
    corpus: CorpusConfig, settings: PrecomputeConfig, store: Store | None, *, calibration_positions: int = 0
) -> Staged:
    """Cut the corpus into units and write them to the cache's store, with a sample that holds text for so many positions;
    without a store, only count and hash.

    Raises `CorpusError` when the corpus cannot be read or holds no row.
    """
    sampled = max(SAMPLED_BYTES, BYTES_PER_CALIBRATION_POSITION * calibration_positions)
    counts = _Counts(least_bytes=None if store is None else sampled)
    units = _write_units(counts.of(documents(read_rows(corpus), corpus)), settings, store)
    if counts.rows_in == 0:
        raise CorpusError(f"the corpus {corpus.source} is empty: check corpus.source, split and text_field")
    if store is not None:
        store.put(SAMPLE, _compressed([(document.to_json() + "\n").encode() for document in counts.sample()]))
    return Staged(units, counts.rows_in, counts.deduplicated, counts.held_out, counts.digest.hexdigest())


def salted_hash(identity: str) -> str:
    """Decides what calibration samples: independent of what `held_out` and the order of the corpus follow."""
    return hashlib.blake2b(identity.encode(), digest_size=16, salt=b"calibration").hexdigest()


def read_unit(store: Store, unit: int) -> list[Document]:
    """The staged documents of a unit."""
    return _read(store, unit_name(unit))


def read_sample(store: Store) -> list[Document]:
    """The documents of the sample."""
    return _read(store, SAMPLE)


def _read(store: Store, name: str) -> list[Document]:
    with pa.CompressedInputStream(pa.BufferReader(store.get(name)), "zstd") as stream:
        return [Document.from_json(line) for line in stream.read().splitlines()]


class _Counts:
    def __init__(self, *, least_bytes: int | None) -> None:
        self._least_bytes = least_bytes  # of the sample; None: without one
        self._kept: list[tuple[int, int, int, Document]] = []  # a heap: the document with the largest hash goes first
        self._kept_bytes = 0
        self.rows_in = self.deduplicated = self.held_out = 0
        self.digest = hashlib.sha256()

    def of(self, items: Iterable[Document | Duplicate]) -> Iterator[Document]:
        for item in items:
            self.rows_in += 1
            if isinstance(item, Duplicate):
                self.deduplicated += 1
                continue
            self.held_out += item.held_out
            self.digest.update(f"{item.source_id} {item.occurrence} {item.problem}\n".encode())
            if self._least_bytes is not None and not (item.held_out or item.problem):
                self._offer(item)
            yield item

    def _offer(self, document: Document) -> None:
        """Keep the documents with the smallest hashes, as few as suffice: the order of the corpus changes nothing."""
        place = -int(salted_hash(document.source_id), 16)
        if self._suffices(self._kept_bytes, len(self._kept)) and place < self._kept[0][0]:
            return
        size = len(document.to_json())
        heapq.heappush(self._kept, (place, self.rows_in, size, document))
        self._kept_bytes += size
        while self._suffices(self._kept_bytes - self._kept[0][2], len(self._kept) - 1):
            self._kept_bytes -= heapq.heappop(self._kept)[2]

    def _suffices(self, size: int, documents: int) -> bool:
        enough = documents >= SAMPLED_DOCUMENTS and size >= (self._least_bytes or 0)
        return enough or size >= MOST_SAMPLED_BYTES

    def sample(self) -> list[Document]:
        """The documents with the smallest hashes, smallest first; held-out ones are never among them."""
        return [entry[-1] for entry in sorted(self._kept, key=lambda entry: (-entry[0], entry[1]))]


def _write_units(items: Iterable[Document], settings: PrecomputeConfig, store: Store | None) -> int:
    units = 0
    for lines in _cut(items, settings):
        if store is not None:
            store.put(unit_name(units), _compressed(lines))
        units += 1
    return units


def _cut(items: Iterable[Document], settings: PrecomputeConfig) -> Iterator[list[bytes]]:
    """Documents, a line each, unit after unit."""
    lines: list[bytes] = []
    size = 0
    for document in items:
        if len(lines) >= settings.unit_rows or size >= settings.unit_bytes:
            yield lines
            lines, size = [], 0
        lines.append((document.to_json() + "\n").encode())
        size += len(lines[-1])
    if lines:
        yield lines


def _compressed(lines: Sequence[bytes]) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(b"".join(lines))
    return sink.getvalue()
