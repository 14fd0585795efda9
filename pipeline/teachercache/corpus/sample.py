"""A sample of a corpus, and how much it stands for, without reading all of a large one.

A corpus of at most `WHOLE_BYTES` of text is read to its end. Of a larger one, blocks of neighbouring rows are read that
are spread evenly over it. How much there is in all follows from the sizes of files, or from the number of rows where the
format tells it (Parquet, indexed datasets).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from teachercache.config import CorpusConfig
from teachercache.corpus.documents import canonical_json
from teachercache.corpus.files import COMPRESSED, Row, parquet_rows, parse_line, text_rows
from teachercache.corpus.hub import open_dataset, slice_bounds
from teachercache.corpus.readers import kind_of, paths_of, read_rows
from teachercache.errors import CorpusError

T = TypeVar("T")

BLOCKS = 32
WHOLE_BYTES = 4 * 2**20  # of text: a corpus that holds no more is read to its end
ROUNDS = 3
MOST_BYTES = 16 * 2**20  # of a sample, where rows are large
COMPRESSED_BYTES = 4 * 2**20  # of a compressed file, that say how much text its bytes hold
SKIPPED_ROWS = 4096  # of a row group, at most: those in front of a block are decoded too
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Block:
    """Neighbouring rows; `measure` is their part of `CorpusSample.total`: bytes of files, or rows."""

    rows: list[Row]
    measure: float


@dataclass(frozen=True)
class CorpusSample:
    """Blocks of a corpus, in its order where it `is_whole`; `counted_by` says what `total` was taken from."""

    blocks: tuple[Block, ...]
    total: float
    counted_by: str
    is_whole: bool = False

    @property
    def factor(self) -> float:
        """The size of the corpus in samples."""
        return self.total / sum(block.measure for block in self.blocks)


def sample_corpus(config: CorpusConfig, *, whole_bytes: int = WHOLE_BYTES) -> CorpusSample:
    """The whole of a corpus of at most `whole_bytes`, or blocks of a larger one, about half as many bytes.

    Raises `CorpusError` for a corpus that cannot be read, and for a stream of unknown length.
    """
    head: list[Row] = []
    size = 0
    for row in read_rows(config):
        head.append(row)
        size += row_bytes(row)
        if size > whole_bytes:
            return _blocks_of(config, head, mean_bytes=size / len(head), block_bytes=whole_bytes // (2 * BLOCKS))
    return CorpusSample((Block(head, len(head)),), len(head), "read to its end", is_whole=True)


def row_bytes(row: Row) -> int:
    """About what a row's values take as text."""
    return sum(len(value) if isinstance(value, str) else len(canonical_json(value)) for value in row.values())


def spread(size: int, *, blocks: int = BLOCKS) -> list[int]:
    """Different places in `range(size)`, the first ones of which are spread evenly too: multiples of the golden ratio."""
    return list(dict.fromkeys(int((0.5 + number * GOLDEN) % 1 * size) for number in range(blocks)))


def _blocks_of(config: CorpusConfig, head: list[Row], *, mean_bytes: float, block_bytes: int) -> CorpusSample:
    kind = kind_of(config)
    rows = max(1, int(block_bytes / mean_bytes))
    if kind == "datasets":
        return _of_dataset(config, head, rows=rows)
    if kind == "python-docs":
        every = [*read_rows(config)]
        return CorpusSample((Block(every, len(every)),), len(every), "read to its end", is_whole=True)
    paths, field = paths_of(config.source, kind=kind), config.messages_field or config.text_field
    if kind == "parquet":
        return _of_parquet(config, paths, field=field, rows=rows)
    if kind == "text":
        return _of_text(config, paths, field=field, block_bytes=block_bytes)
    return _of_jsonl(config, paths, block_bytes=block_bytes)


def _of_dataset(config: CorpusConfig, head: list[Row], *, rows: int) -> CorpusSample:
    dataset, field = open_dataset(config), config.messages_field or config.text_field
    if not hasattr(dataset, "__len__"):
        total = _length_of_stream(dataset, config)
        return CorpusSample((Block(head, len(head)),), total, "what the dataset says of itself; its first rows alone")
    total = min(len(dataset), config.limit or len(dataset))
    values = dataset.select_columns([field]).with_format(None)

    def read(row: int) -> Block:
        found = values[row : row + rows][field]
        return Block([{field: value} for value in found], len(found))

    return CorpusSample(_read(spread(total), read), total, "the dataset's number of rows")


def _length_of_stream(dataset: Any, config: CorpusConfig) -> int:
    splits = getattr(dataset.info, "splits", None) or {}
    said = getattr(splits.get(config.split), "num_examples", None)
    if said is None and config.limit is None:
        raise CorpusError(
            f"dataset {config.source} is a stream that does not say how many rows it has; say how many to count with: "
            "corpus.limit, or --limit"
        )
    return min(number for number in (said, config.limit) if number is not None)


def _of_parquet(config: CorpusConfig, paths: Sequence[Path], *, field: str, rows: int) -> CorpusSample:
    groups = [(path, start, count) for path in paths for start, count in _row_groups(path)]
    ends = [*accumulate(count for *_, count in groups)]
    counted = ends[-1]
    total = min(config.limit or counted, counted)

    def read(row: int) -> Block:
        number = bisect_right(ends, row)
        path, start, count = groups[number]
        first = start + min((row - (ends[number] - count)) % SKIPPED_ROWS, max(0, count - rows))
        found = [*parquet_rows([path], field=field, start=first, stop=first + rows)]
        return Block(found, len(found))

    sample = CorpusSample(_read(spread(total), read), total, "numbers of rows in the footers")
    return _sliced(sample, config, rows=counted)


def _row_groups(path: Path) -> list[tuple[int, int]]:
    """First row and number of rows of each row group."""
    metadata = pq.read_metadata(path)
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return [(sum(counts[:group]), count) for group, count in enumerate(counts)]


def _of_text(config: CorpusConfig, paths: Sequence[Path], *, field: str, block_bytes: int) -> CorpusSample:
    paths = paths[: config.limit]

    def read(number: int) -> Block:
        path = paths[number]
        return Block([*text_rows([path], field=field)], path.stat().st_size)

    total = sum(path.stat().st_size for path in paths)
    places = spread(len(paths), blocks=8 * BLOCKS)
    sample = CorpusSample(_read(places, read, least_bytes=BLOCKS * block_bytes), total, "sizes of files")
    return _sliced(sample, config, rows=len(paths))


def _of_jsonl(config: CorpusConfig, paths: Sequence[Path], *, block_bytes: int) -> CorpusSample:
    """By bytes; by rows where `corpus.limit` ends before the files do."""
    sizes = [path.stat().st_size for path in paths]

    def blocks(share: float) -> tuple[Block, ...]:
        places = Counter(_place(paths, sizes, offset) for offset in spread(int(share * sum(sizes))))
        return _read([*places], lambda place: _lines_at(place, block_bytes=places[place] * block_bytes))

    sample = CorpusSample(blocks(1.0), sum(sizes), "sizes of files")
    rows = sample.factor * sum(len(block.rows) for block in sample.blocks)
    if config.limit is not None and config.limit < rows:
        for _ in range(ROUNDS):  # rows at the beginning may be shorter than those of the whole
            part = blocks(min(1.0, config.limit / rows))
            rows = sum(sizes) / sum(block.measure for block in part) * sum(len(block.rows) for block in part)
        counted = tuple(replace(block, measure=len(block.rows)) for block in part)
        return CorpusSample(counted, config.limit, "corpus.limit")
    return _sliced(sample, config, rows=int(rows))


def _place(paths: Sequence[Path], sizes: Sequence[int], offset: int) -> tuple[Path, int]:
    """The file of a place in all of them, and the place in it: 0 in a compressed one."""
    for path, size in zip(paths, sizes, strict=True):
        if offset < size:
            return path, 0 if path.suffix.lower() in COMPRESSED else offset
        offset -= size
    raise AssertionError(offset)


def _lines_at(place: tuple[Path, int], *, block_bytes: int) -> Block:
    """Whole lines from a place on."""
    path, offset = place
    if path.suffix.lower() in COMPRESSED:
        return _compressed_lines(path, block_bytes=block_bytes)
    with path.open("rb") as file:
        file.seek(offset)
        cut = file.readline() if offset else b""
        lines = file.readlines(block_bytes)
        if not lines:  # the last line: the file's first ones stand for it
            file.seek(0)
            lines = file.readlines(block_bytes) or [cut]
    return Block(_parsed(lines, path), sum(map(len, lines)))


def _compressed_lines(path: Path, *, block_bytes: int) -> Block:
    """The first lines of a file; their measure is the compressed bytes that they take on average."""
    codec = pa.Codec.detect(str(path)).name
    text, length = b"", 0
    try:
        with path.open("rb") as raw, pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec) as stream:
            while raw.tell() < COMPRESSED_BYTES and (chunk := stream.read(2**16)):
                text, length = text + chunk if len(text) < block_bytes else text, length + len(chunk)
            compressed = raw.tell()
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"corpus file {path} is damaged: {' '.join(str(error).split())}; fetch it again") from None
    end = text.find(b"\n", block_bytes) + 1
    whole = text[:end] if end else text if len(text) == length else text[: text.rfind(b"\n") + 1] or text
    return Block(_parsed(whole.splitlines(), path), len(whole) * compressed / max(1, length))


def _parsed(lines: Sequence[bytes], path: Path) -> list[Row]:
    return [parse_line(line, origin=path.name) for line in lines if line.strip()]


def _read(places: Sequence[T], read: Callable[[T], Block], *, least_bytes: int = 0) -> tuple[Block, ...]:
    """At least `BLOCKS` blocks at these places, which hold so many bytes, if there are as many; fewer, where they are large."""
    found: list[Block] = []
    size = 0
    for place in places:
        block = read(place)
        size += sum(map(row_bytes, block.rows))
        if block.rows:
            found.append(block)
        if size > MOST_BYTES or (len(found) >= BLOCKS and size >= least_bytes):
            break
    return tuple(found)


def _sliced(sample: CorpusSample, config: CorpusConfig, *, rows: int) -> CorpusSample:
    """The sample, for the part of the corpus that `corpus.split` leaves."""
    if config.split == "train":
        return sample
    parts = slice_bounds(config.split, {"train": rows}, origin=f"corpus {config.source}")
    kept = sum(max(0, stop - start) for _, start, stop in parts)
    return replace(sample, total=sample.total * kept / max(1, rows))
