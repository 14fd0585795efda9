"""Partitions: the parts of a corpus that are read apart, by anyone and in any order.

A partition is some files, or a range of one: row groups of Parquet, bytes of JSON lines. Its rows have places, from which it
can be read again. A corpus of at most `PARTITION_BYTES` is one partition, whatever it is made of.

What `datasets` serves (hub, streams, folders that it describes) is no files that anyone could read, and has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import dropwhile, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from teachercache.config import CorpusConfig
from teachercache.corpus import files
from teachercache.corpus.files import Placed, Row, is_compressed
from teachercache.corpus.hub import slice_bounds
from teachercache.corpus.python_docs import python_topics
from teachercache.corpus.readers import count_rows, kind_of, paths_of

PARTITION_BYTES = 2**26
MOST_PARTITIONS = 2**14  # of a corpus, about: those of a larger one are larger


class Place(NamedTuple):
    """The place of a row in its partition: the span, rows or lines of the span before it, the byte that its line begins at."""

    span: int = 0
    row: int = 0
    byte: int = 0


BEGINNING = Place()


@dataclass(frozen=True)
class Span:
    """A file, or a part of it: `start` to `stop` are row groups of Parquet and bytes of JSON lines, `first` to `last` rows of
    these; None is the end."""

    path: str
    start: int = 0
    stop: int | None = None
    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class Partition:
    """Spans of files of one `kind`, as `corpus.format` has it. At most `limit` rows are read of them."""

    kind: str
    spans: tuple[Span, ...]
    limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As a plan keeps it."""
        return {**vars(self), "spans": [list(vars(span).values()) for span in self.spans]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Partition:
        """Inverse of `to_json`."""
        return cls(**{**data, "spans": tuple(Span(*span) for span in data["spans"])})


def partitions_of(config: CorpusConfig, *, partition_bytes: int = PARTITION_BYTES) -> list[Partition] | None:
    """The partitions of a corpus, in its order, each of about so many bytes, but for files that cannot be split; None for what
    `datasets` serves. A slice or a limit makes one of all. Opens no file but large ones of Parquet, and what a slice counts.

    Raises `CorpusError`.
    """
    kind, field = kind_of(config), config.messages_field or config.text_field
    if kind == "datasets":
        return None
    if kind == "python-docs":
        return [Partition(kind, tuple(_sliced([Span("python-docs")], [len(python_topics())], config)), config.limit)]
    paths = paths_of(config.source, kind=kind)
    spans = [Span(str(path.absolute())) for path in paths]
    sizes = [path.stat().st_size for path in paths]
    if config.split != "train":
        spans = _sliced(spans, [count_rows(path, kind=kind) for path in paths], config)
    if config.split != "train" or config.limit is not None:
        return [Partition(kind, tuple(spans), config.limit)]
    most = max(partition_bytes, sum(sizes) // MOST_PARTITIONS)
    parts = (part for span, size in zip(spans, sizes, strict=True) for part in _parts(span, size, kind, field, most))
    return [Partition(kind, group) for group in _grouped(parts, most)]


def read_partition(
    partition: Partition, config: CorpusConfig, *, start: Place = BEGINNING
) -> Iterator[tuple[int, int, int, Row]]:
    """Rows from a place on, each behind the numbers of its `Place`."""
    return islice(_read(partition, config.messages_field or config.text_field, start), partition.limit)


def _read(partition: Partition, field: str, start: Place) -> Iterator[tuple[int, int, int, Row]]:
    for number, span in enumerate(partition.spans[start.span :], start=start.span):
        row, byte = (start.row, start.byte) if number == start.span else (0, 0)
        for passed, at, values in _placed(partition.kind, span, field, row=row, byte=byte):
            yield number, passed, at, values


def _placed(kind: str, span: Span, field: str, *, row: int, byte: int) -> Iterator[Placed]:
    path = Path(span.path)
    if kind == "parquet":
        first = max(row, span.first)
        return files.parquet_placed(path, field=field, start=span.start, stop=span.stop, row=first, last=span.last)
    if kind == "jsonl" and not (span.first or span.last is not None):
        return files.jsonl_placed(path, start=span.start, stop=span.stop, row=row, byte=byte)
    if kind == "jsonl":  # of a slice: rows are counted from its beginning
        rows = islice(files.jsonl_placed(path), span.first, span.last)
        return dropwhile(lambda placed: placed[0] < row, rows)
    if kind == "text":
        return ((0, 0, values) for values in files.text_rows([path], field=field))
    return _topics(field, max(row, span.first), span.last)


def _topics(field: str, first: int, last: int | None) -> Iterator[Placed]:
    return ((number, 0, {field: text}) for number, text in enumerate(_python_topics()[first:last], start=first))


@lru_cache(maxsize=1)
def _python_topics() -> list[str]:
    return python_topics()


def _sliced(spans: Sequence[Span], counts: Sequence[int], config: CorpusConfig) -> list[Span]:
    """The spans of whole files, as far as `corpus.split` takes of them."""
    if config.split == "train":
        return list(spans)
    parts = slice_bounds(config.split, {"train": sum(counts)}, origin=f"corpus {config.source}")
    return [span for _, start, stop in parts for span in _within(spans, counts, start, stop)]


def _within(spans: Sequence[Span], counts: Sequence[int], start: int, stop: int) -> Iterator[Span]:
    passed = 0
    for span, count in zip(spans, counts, strict=True):
        first, last = max(0, start - passed), min(count, stop - passed)
        if first < last:
            yield replace(span, first=first, last=last)
        passed += count


def _parts(span: Span, size: int, kind: str, field: str, most: int) -> Iterator[tuple[Span, int]]:
    """A file in parts of about `most` bytes, as far as it can be read from its middle."""
    path = Path(span.path)
    if kind == "text" or size <= most or (kind == "jsonl" and is_compressed(path)):
        yield span, size
    elif kind == "jsonl":
        bounds = [number * size // -(-size // most) for number in range(-(-size // most) + 1)]
        yield from ((replace(span, start=a, stop=b), b - a) for a, b in pairwise(bounds))
    else:
        sizes = [found for _, found in files.parquet_groups(path, field=field)]
        for group in _grouped(enumerate(sizes), most):
            yield replace(span, start=group[0], stop=group[-1] + 1), sum(sizes[number] for number in group)


def _grouped(items: Iterable[tuple[Any, int]], most: int) -> Iterator[tuple[Any, ...]]:
    """Neighbours that are of `most` bytes together."""
    group: list[Any] = []
    total = 0
    for item, size in items:
        if group and total + size > most:
            yield tuple(group)
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield tuple(group)
