"""Rows of local files: Parquet, JSON lines and plain text, in bounded memory.

Every format offers the same functions: `*_count(paths)`, the number of rows; `*_rows(paths, field, start, stop)`, which yields
rows `start` to `stop` of all files in the given order; and `*_placed(path, …)`, which yields rows of a part of one file with
their places, from which it can begin again. Rows are plain dicts. One that cannot be decoded is yielded as `{"_unreadable":
reason, "_raw": excerpt}`, so that it can be quarantined with its reason.
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
Placed = tuple[int, int, Row]  # rows or lines of the file's part before it, the byte that its line begins at, the row

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
    numbered = ((path, number, line) for path in paths for number, _, line in _lines(path))
    for path, number, line in islice(numbered, start, stop):
        yield parse_line(line, origin=f"{path.name} line {number}")


def jsonl_placed(
    path: Path, *, start: int = 0, stop: int | None = None, row: int = 0, byte: int = 0
) -> Iterator[Placed]:
    """Rows of the lines that begin in the bytes `start` to `stop` of a file, from the one at `byte` on, behind `row` lines of
    them; a compressed file has one part, and is read up to there."""
    beyond = f" after byte {start}" if start else ""
    for number, at, line in _lines(path, start=start, stop=stop, passed=row, byte=byte):
        yield number - 1, at, parse_line(line, origin=f"{path.name} line {number}{beyond}")


def _lines(
    path: Path, *, start: int = 0, stop: int | None = None, passed: int = 0, byte: int = 0
) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and content of lines that are not blank."""
    with open_bytes(path) as file:
        try:
            at = _seek(file, path, start=start, passed=passed, byte=byte)
            for number, raw in enumerate(file, start=passed + 1):
                if stop is not None and at >= stop:
                    return
                line = raw.removeprefix(b"\xef\xbb\xbf").strip() if at == 0 else raw.strip()
                if at == 0 and line.startswith(b"["):
                    raise CorpusError(
                        f"corpus file {path} is a JSON array, not one object a line; "
                        f"convert it: jq -c '.[]' {path.name} > {path.stem}.jsonl"
                    )
                if line:
                    yield number, at, line
                at += len(raw)
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(
                f"corpus file {path} is damaged: {' '.join(str(error).split())}; fetch it again"
            ) from None


def _seek(file: io.BufferedReader, path: Path, *, start: int, passed: int, byte: int) -> int:
    """Go to the line with so many before it; returns the byte that it begins at."""
    if is_compressed(path):
        return sum(len(line) for line in islice(file, passed))
    if passed:
        return file.seek(byte)
    if start == 0:
        return 0
    file.seek(start - 1)  # the line that begins at `start` is ours, one that only reaches there is not
    return start - 1 + len(file.readline())


def is_compressed(path: Path) -> bool:
    """Tells by its name whether a file can only be read from its beginning."""
    return path.suffix.lower() in COMPRESSED


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


def parquet_placed(
    path: Path, *, field: str, start: int = 0, stop: int | None = None, row: int = 0, last: int | None = None
) -> Iterator[Placed]:
    """Rows of the row groups `start` to `stop` of a file, from number `row` of them to before `last`."""
    with _open_parquet(path) as file:
        check_field(field, file.schema_arrow.names, origin=f"corpus file {path}")
        passed = 0
        for group in range(start, file.num_row_groups if stop is None else stop):
            rows = file.metadata.row_group(group).num_rows
            first, end = max(row - passed, 0), rows if last is None else min(last - passed, rows)
            if first < end:
                inside = islice(_row_group(file, group, path=path, field=field, first=first), end - first)
                yield from ((number, 0, values) for number, values in enumerate(inside, start=passed + first))
            passed += rows


def parquet_groups(path: Path, *, field: str) -> list[tuple[int, int]]:
    """Rows of each row group, and bytes of the wanted column in it; from the footer alone."""
    with _open_parquet(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        return [(group.num_rows, _bytes_of(group, field)) for group in groups]


def _bytes_of(group: pq.RowGroupMetaData, field: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.partition(".")[0] == field)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        # pre-buffering would hold a whole row group; these may be gigabytes
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"corpus file {path} is not readable Parquet: {' '.join(str(error).split())}; fetch it again, or say what it is "
            "with corpus.format"
        ) from None


def _row_group(file: pq.ParquetFile, group: int, *, path: Path, field: str, first: int = 0) -> Iterator[Row]:
    """Rows of a row group; those before `first` are decoded, but not made."""
    passed = 0
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=[field]):
            if passed + len(batch) > first:
                yield from _values(batch.column(0)[max(0, first - passed) :], field=field, origin=path.name)
            passed += len(batch)
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
