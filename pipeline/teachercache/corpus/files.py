"""Rows of local files: Parquet, JSON lines and plain text, in bounded memory.

Every format offers the same two functions: `*_count(paths)`, the number of rows, and `*_rows(paths, field, start,
stop)`, which yields rows `start` to `stop` of all files in the given order. Rows are plain dicts. One that cannot be
decoded is yielded as `{"_unreadable": reason, "_raw": excerpt}`, so that it can be quarantined with its reason.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from teachercache.errors import CorpusError

Row = dict[str, Any]

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
BATCH_ROWS = 256
EXCERPT_BYTES = 500


def format_of(path: str | Path) -> str | None:
    """The format that a file's name says, seen through a compression suffix; None for an unknown one."""
    return SUFFIXES.get(suffix_of(path))


def suffix_of(path: str | Path) -> str:
    """A file's suffix in lower case, seen through a compression suffix."""
    path = Path(path)
    return (Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix).lower()


def unreadable(reason: str, raw: bytes) -> Row:
    """The row that stands for one that could not be decoded."""
    return {"_unreadable": reason, "_raw": raw[:EXCERPT_BYTES].decode("utf-8", errors="backslashreplace")}


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file for reading, decompressed as its suffix says."""
    try:
        # a pyarrow stream is a raw stream in all but its declared type
        return io.BufferedReader(pa.input_stream(str(path)))
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"corpus file {path} cannot be opened: {' '.join(str(error).split())}; check its permissions and its suffix"
        ) from None


def jsonl_count(paths: Sequence[Path]) -> int:
    """Number of lines that are not blank."""
    return sum(1 for path in paths for _ in _lines(path))


def jsonl_rows(paths: Sequence[Path], *, field: str, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """JSON lines, one object a line; a line that is not one is yielded as unreadable. `field` is not looked at here."""
    numbered = ((path, number, line) for path in paths for number, line in _lines(path))
    for path, number, line in islice(numbered, start, stop):
        yield parse_line(line, origin=f"{path.name} line {number}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_bytes(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if number == 1 and line.startswith(b"["):
                    raise CorpusError(
                        f"corpus file {path} is a JSON array, not one object a line; "
                        f"convert it: jq -c '.[]' {path.name} > {path.stem}.jsonl"
                    )
                if line:
                    yield number, line
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(
                f"corpus file {path} is damaged: {' '.join(str(error).split())}; fetch it again"
            ) from None


def parse_line(line: bytes, *, origin: str) -> Row:
    """The row of a line of JSON; unreadable where it is no object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return unreadable(f"{origin}: not JSON: {error}", line)
    if not isinstance(row, dict):
        return unreadable(f"{origin}: not a JSON object but {type(row).__name__}", line)
    return row


def text_count(paths: Sequence[Path]) -> int:
    """Number of files."""
    return len(paths)


def text_rows(paths: Sequence[Path], *, field: str, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """UTF-8 text files, each one document under the name `field`."""
    for path in islice(paths, start, stop):
        with open_bytes(path) as file:
            try:
                content = file.read()
            except (OSError, pa.ArrowException) as error:
                raise CorpusError(
                    f"corpus file {path} is damaged: {' '.join(str(error).split())}; fetch it again"
                ) from None
        try:
            yield {field: content.decode("utf-8").removeprefix("\ufeff")}
        except UnicodeDecodeError as error:
            yield unreadable(f"{path.name}: not UTF-8: {error.reason} at byte {error.start}", content)


def parquet_count(paths: Sequence[Path]) -> int:
    """Number of rows, from the footers alone."""
    total = 0
    for path in paths:
        with _open_parquet(path) as file:
            total += file.metadata.num_rows
    return total


def parquet_rows(paths: Sequence[Path], *, field: str, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """The column `field` of Parquet files; other columns are not decoded, row groups outside the range not read.

    Raises `CorpusError` for a file without that column, before the first row of any file.
    """
    for path in paths:
        with _open_parquet(path) as file:
            check_field(field, file.schema_arrow.names, origin=f"corpus file {path}")
    passed = 0
    for path in paths:
        with _open_parquet(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                first, last = max(start - passed, 0), rows if stop is None else min(stop - passed, rows)
                passed += rows
                if first < last:
                    yield from islice(_row_group(file, group, path=path, field=field), first, last)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        # pre-buffering would hold a whole row group; these may be gigabytes
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"corpus file {path} is not readable Parquet: {' '.join(str(error).split())}; fetch it again, or say what it is "
            "with corpus.format"
        ) from None


def _row_group(file: pq.ParquetFile, group: int, *, path: Path, field: str) -> Iterator[Row]:
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=[field]):
            yield from _values(batch.column(0), field=field, origin=path.name)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"corpus file {path} is damaged: {' '.join(str(error).split())}; fetch it again") from None


def _values(column: pa.Array, *, field: str, origin: str) -> Iterator[Row]:
    try:
        yield from [{field: value} for value in column.to_pylist()]
    except UnicodeDecodeError:  # Parquet does not check UTF-8; find the rows that break it
        for value in column:
            try:
                yield {field: value.as_py()}
            except UnicodeDecodeError as error:
                yield unreadable(f"{origin}: not UTF-8: {error.reason} at byte {error.start}", bytes(error.object))


def check_field(field: str, present: Sequence[str], *, origin: str) -> None:
    """Raise `CorpusError` when `field` is not among the fields of a corpus; the message lists them."""
    if field not in present:
        raise CorpusError(
            f"{origin} has no field `{field}`; it has {', '.join(sorted(present)) or 'none'}: "
            "set corpus.text_field, or corpus.messages_field for chat"
        )
