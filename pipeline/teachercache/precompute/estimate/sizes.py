"""Sizes: where the bytes of a sample's cache are, and what each of them grows with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from teachercache.cache import Cache
from teachercache.cache.files.schema import ROW_COLUMNS, shard_metadata
from teachercache.cache.manifest.alignment_manifest import ALIGNMENTS
from teachercache.precompute.estimate.measured import Amount

TOKENS = "tokens and text"
FRAMING = "files' headers"
READ_BY = "basis, tokenizer"  # files beside the shards, whose size is the same for any corpus


@dataclass(frozen=True)
class SampleBytes:
    """Sizes of a cache of one shard. `columns` are by part and by what their entries belong to; `framing` is Arrow's, of
    batches, `header` what each shard has, `beside` what lies beside the shards."""

    columns: Mapping[tuple[str, str], float]
    framing: float = 0
    header: float = 0
    beside: float = 0

    def of(self, corpus: Amount, *, sample: Amount, units: int) -> dict[str, int]:
        """The sizes of parts for a corpus, in bytes."""
        times = {"position": corpus.positions / sample.positions, "token": corpus.tokens / sample.tokens}
        times["pair"] = corpus.pairs / sample.pairs
        parts: Counter[str] = Counter()
        for (part, grows_with), size in self.columns.items():
            parts[part] += round(size * times[grows_with])
        parts[FRAMING] = round(self.header * units + self.framing * times["token"])
        parts[READ_BY] = round(self.beside)
        return {part: size for part, size in parts.items() if size}


def sizes_of(cache: Cache) -> SampleBytes:
    """Sizes of a cache of one shard, its alignments apart."""
    sections = cache.targets.sections.items()
    places = {column.name: (section, column.of) for section, kind in sections for column in kind.columns}
    places |= dict.fromkeys(ROW_COLUMNS, (TOKENS, "token"))
    [shard] = cache.manifest.shards
    paths = [cache.folder / file.file for file in shard.files.values()]
    schemas = [pa.ipc.open_file(path).schema for path in paths]
    columns: Counter[tuple[str, str]] = Counter()
    tables = 0
    for name, size in cache.manifest.column_bytes.items():
        of_tables = sum(_table_bytes(schema, name) for schema in schemas)
        columns[places[name]] += size - of_tables
        tables += of_tables
    headers = sum(map(header_bytes, schemas))
    total = sum(path.stat().st_size for path in paths)
    framing = max(0, total - sum(cache.manifest.column_bytes.values()) - (headers - tables))
    return SampleBytes(columns, framing=framing, header=headers, beside=_others(cache.folder, paths))


def header_bytes(schema: pa.Schema) -> int:
    """Bytes of a schema, which stands at both ends of a file."""
    return int(2 * schema.serialize().size)


def _table_bytes(schema: pa.Schema, column: str) -> int:
    return 2 * len(shard_metadata(schema)["columns"].get(column, {}).get("tables", ""))


def sizes_of_alignment(folder: Path, *, student: str) -> SampleBytes:
    """Sizes of an alignment of one shard."""
    paths = sorted(folder.glob("part-*.arrow"))
    headers = sum(header_bytes(pa.ipc.open_file(path).schema) for path in paths)
    size = sum(path.stat().st_size for path in paths) - headers
    return SampleBytes({(f"aligned with {student}", "token"): size}, header=headers, beside=_others(folder, paths))


def _others(folder: Path, paths: Sequence[Path]) -> int:
    """Bytes of the other files in a folder; alignments in it are counted apart."""
    files = (path for path in folder.rglob("*") if path.is_file() and path not in paths)
    return sum(path.stat().st_size for path in files if path.relative_to(folder).parts[0] != ALIGNMENTS)
