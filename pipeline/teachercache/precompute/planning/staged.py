"""A corpus that nobody else could read, or not twice (streams, datasets of the hub), as documents in the cache's store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa

from teachercache.cache.stores.store import Store
from teachercache.config import CorpusConfig
from teachercache.corpus.documents import Document, document_of
from teachercache.corpus.files import Row
from teachercache.corpus.partitions import BEGINNING, Partition, Place, Span, read_partition
from teachercache.precompute.planning.shelf import Shelf

STAGED = "documents"  # kind of such a partition; its spans are objects of the store


def stage(rows: Iterable[Row], config: CorpusConfig, shelf: Shelf, *, partition_bytes: int) -> Iterator[Partition]:
    """Write the documents of all rows, about so many bytes of JSON to an object; yields a partition for each, once it is
    written."""
    for number, documents in enumerate(_batches((document_of(row, config) for row in rows), partition_bytes)):
        name = f"{number:06d}.jsonl.zst"
        write_documents(shelf, name, documents)
        yield Partition(STAGED, (Span(shelf.name(name)),))


def _batches(documents: Iterable[Document], most: int) -> Iterator[list[bytes]]:
    lines: list[bytes] = []
    size = 0
    for document in documents:
        if size >= most:
            yield lines
            lines, size = [], 0
        lines.append(_line(document))
        size += len(lines[-1])
    if lines:
        yield lines


def _line(document: Document) -> bytes:
    return (document.to_json() + "\n").encode()


def rows_of(
    partition: Partition, config: CorpusConfig, *, store: Store, start: Place = BEGINNING
) -> Iterator[tuple[int, int, int, Row | Document]]:
    """Rows of a partition from a place on, each behind the numbers of its `Place`; of one that was staged, its documents."""
    if partition.kind != STAGED:
        return read_partition(partition, config, start=start)
    [span] = partition.spans
    lines = islice(_lines(store, span.path), start.row, None)
    return ((0, row, 0, Document.from_json(line)) for row, line in enumerate(lines, start=start.row))


def write_documents(shelf: Shelf, name: str, lines: Iterable[bytes | Document]) -> None:
    """Documents, or lines of them, as one object."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        for line in lines:
            stream.write(_line(line) if isinstance(line, Document) else line)
    shelf.store.put(shelf.name(name), sink.getvalue())


def read_documents(shelf: Shelf, name: str) -> list[Document]:
    """Inverse of `write_documents`."""
    return [Document.from_json(line) for line in _lines(shelf.store, shelf.name(name))]


def _lines(store: Store, name: str) -> list[bytes]:
    with pa.CompressedInputStream(pa.BufferReader(store.get(name)), "zstd") as stream:
        return bytes(stream.read()).splitlines()
