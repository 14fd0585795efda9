"""A corpus that nobody else could read, or not twice (streams, datasets of the hub), as documents in the cache's store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa

from teachercache.cache.stores.store import Store, place
from teachercache.config import CorpusConfig
from teachercache.corpus.documents import Document, document_of
from teachercache.corpus.files import Row
from teachercache.corpus.partitions import BEGINNING, Partition, Place, Span, read_partition
from teachercache.errors import JobFailed
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
    sink, digest = pa.BufferOutputStream(), hashlib.sha256()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        for line in lines:
            text = _line(line) if isinstance(line, Document) else line
            digest.update(text)
            stream.write(text)
        stream.write(_last_line(digest.hexdigest()))
    shelf.store.put(shelf.name(name), sink.getvalue())


def read_documents(shelf: Shelf, name: str) -> list[Document]:
    """Inverse of `write_documents`."""
    return [Document.from_json(line) for line in _lines(shelf.store, shelf.name(name))]


def _last_line(sha256: str) -> bytes:
    """Digest of the lines before: zstd as Arrow writes it has no check sum."""
    return json.dumps({"sha256": sha256}).encode() + b"\n"


def _lines(store: Store, name: str) -> list[bytes]:
    """Lines of documents; an object that has other bytes than were staged is removed, so that the next run stages it again."""
    try:
        lines = _checked(store.get(name))
    except FileNotFoundError:
        lines = None
    if lines is None:
        store.delete(name)
        raise JobFailed(
            f"{place(store, name)} is gone, or has other bytes than were staged; run the same command again: the corpus is "
            "read anew, and finished units stay"
        )
    return lines


def _checked(data: bytes) -> list[bytes] | None:
    try:
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            *lines, last = bytes(stream.read()).splitlines(keepends=True)
    except (ValueError, OSError):  # which Arrow raises for bytes that are no zstd
        return None
    return lines if last == _last_line(hashlib.sha256(b"".join(lines)).hexdigest()) else None
