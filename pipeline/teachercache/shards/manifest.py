"""manifest.json: everything that a reader needs to know, and the digest of every file.

It is written last, by temp file and rename: a folder without it is no cache. It carries the digest of itself. Nothing in
it is trusted further than it can be checked: file names are relative and stay inside the cache, unknown format versions
are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from teachercache.errors import CacheDamaged, CacheError
from teachercache.files import write_whole
from teachercache.shards.claims import check_manifest
from teachercache.shards.regular_files import MOST_MANIFEST_BYTES, read_regular
from teachercache.shards.schema import ROW_COLUMNS
from teachercache.targets.stored import section_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
JOB_KEYS = ("teacher", "tokenizer", "corpus", "sequence", "targets", "units")
WORK_FOLDER = ".work"  # plan, staged units and records of finished ones; gone when the manifest is committed


@dataclass(frozen=True)
class FileInfo:
    """A file that is no shard: its path inside the cache, size and sha256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardInfo(FileInfo):
    """A shard. Its first `rows - held_out_rows` rows are for training, the rest is held out."""

    rows: int
    held_out_rows: int
    positions: int
    held_out_positions: int
    tokens: int


@dataclass(frozen=True)
class Audit:
    """Where each row of the corpus went: `rows_in = stored + quarantined + deduplicated`."""

    rows_in: int
    stored: int
    quarantined: int
    deduplicated: int
    windowed_documents: int  # documents longer than a sequence …
    extra_windows: int  # … and the windows that they gave beyond their first
    windows_without_targets: int  # windows of stored documents that only hold prompt tokens: not stored
    windows_quarantined: int  # windows of stored documents that have no usable targets: not stored

    def __post_init__(self) -> None:
        if self.rows_in != self.stored + self.quarantined + self.deduplicated:
            raise CacheDamaged(f"the audit does not add up: {self}")


@dataclass(frozen=True)
class Manifest:
    """Typed view of manifest.json. Dicts are descriptive: their keys are documented in FORMAT.md."""

    fingerprint: str
    teacher: dict[str, Any]
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    corpus: dict[str, Any]
    sequence: dict[str, Any]
    targets: dict[str, Any]
    units: dict[str, Any]
    audit: Audit
    shards: list[ShardInfo]
    files: list[FileInfo]
    column_bytes: dict[str, int]  # compressed bytes of each column over all shards
    created_by: str
    calibration: dict[str, Any] = field(default_factory=dict)  # what the sketch was fitted to
    fidelity: dict[str, Any] = field(default_factory=dict)  # KL(teacher ‖ stored), measured while capturing
    input_form: dict[str, Any] = field(default_factory=dict)  # the teacher's loss by what rows begin with, on a sample
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def job(self) -> dict[str, Any]:
        """What the fingerprint covers: inputs and settings, but nothing about how fast or where they were used."""
        return {name: getattr(self, name) for name in JOB_KEYS}

    @property
    def logits(self) -> dict[str, Any]:
        """Settings of the logit targets, e.g. `{"kind": "top-k", "k": 64, …}`."""
        return self.targets["logits"]

    @property
    def vocabulary_size(self) -> int:
        """Tokens of the teacher's tokenizer: every distribution is over exactly these."""
        return self.tokenizer["vocabulary_size"]

    @property
    def tokenizer_fingerprint(self) -> str:
        """Equal fingerprints map text to equal ids."""
        return self.tokenizer["fingerprint"]

    @property
    def pad_id(self) -> int:
        """Token that fills up batches; never seen by a loss."""
        return self.tokenizer["pad_id"]

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Tokens that every row and every packed segment begins with, never targets; caches of earlier versions do not
        say, and only the beginnings of documents may have them there."""
        return tuple(self.tokenizer.get("prefix_ids", ()))

    @property
    def layout(self) -> str:
        """`documents` or `packed`."""
        return self.sequence["layout"]

    @property
    def sequence_length(self) -> int:
        """Most tokens in a row."""
        return self.sequence["length"]

    @property
    def rows(self) -> int:
        """Rows in all shards, held-out ones included."""
        return sum(shard.rows for shard in self.shards)

    @property
    def positions(self) -> int:
        """Stored targets in all shards."""
        return sum(shard.positions for shard in self.shards)

    @property
    def shard_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def bytes_per_position(self) -> dict[str, float]:
        """On disk: `logits`, `boundary_mass`, `hidden` and `attention` where there are such columns, `tokens` (ids, masks,
        ids of rows, text), `total` (with Arrow's framing)."""
        positions = max(1, self.positions)
        tokens = sum(self.column_bytes[name] for name in ROW_COLUMNS)
        layers: dict[str, int] = {}
        for name, size in self.column_bytes.items():
            section = section_of(name)
            if section is not None:
                layers[section] = layers.get(section, 0) + size
        logits = sum(self.column_bytes.values()) - tokens - sum(layers.values())
        sizes = {"logits": logits, **layers, "tokens": tokens, "total": self.shard_bytes}
        return {name: round(size / positions, 2) for name, size in sizes.items()}

    def to_json(self) -> str:
        """The file's text, its own digest included."""
        data = dataclasses.asdict(self)
        return json.dumps({"format": "teachercache", **data, "digest": _digest(data)}, indent=1, sort_keys=True) + "\n"


def commit_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json by temp file and rename; from here on the folder is a cache."""
    write_whole(folder / MANIFEST, manifest.to_json())


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json.

    Raises `CacheError` when there is no cache or only half of one, `CacheDamaged` when the manifest was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CacheError(_explain_missing(folder))
    return parse_manifest(lambda: read_regular(folder, MANIFEST, most=MOST_MANIFEST_BYTES), name=str(path))


def parse_manifest(read: Callable[[], bytes], *, name: str) -> Manifest:
    """The manifest from the bytes that `read` gives; `name` is what errors call the file. Raises as `read_manifest` does."""
    try:
        data = json.loads(read())  # read in here: nobody else then holds the text, 25 MB for 100,000 shards
        if data.pop("format") != "teachercache":
            raise ValueError("it is not a teachercache manifest")
        version, digest = data["format_version"], data.pop("digest")
        if version != FORMAT_VERSION:
            raise CacheError(
                f"{name} has format version {version}, this version of teachercache reads {FORMAT_VERSION}; "
                "read it with the version that its `created_by` names, or precompute it again"
            )
        if digest != _digest(data):
            raise ValueError("its digest does not match: it was edited or damaged")
        return _build(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheDamaged(f"{name} cannot be trusted: {error}; fetch the cache again or precompute it again") from None


def _build(data: dict[str, Any]) -> Manifest:
    data["shards"] = [ShardInfo(**shard) for shard in data["shards"]]
    data["files"] = [FileInfo(**file) for file in data["files"]]
    data["audit"] = Audit(**data["audit"])
    manifest = Manifest(**data)
    if manifest.fingerprint != fingerprint_of(manifest.job):
        raise ValueError("its fingerprint does not match its settings")
    for entry in [*manifest.shards, *manifest.files]:
        check_inside(entry.file)
    check_manifest(manifest, row_columns=ROW_COLUMNS)
    return manifest


def check_inside(file: str) -> None:
    """Raise `ValueError` for a name of a file that is not below the cache's folder."""
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or not path.parts:
        raise ValueError(f"it names {file!r}, which is outside the cache")


def _explain_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no cache at {folder}; make one with `teachercache precompute RECIPE`"
    work = folder / WORK_FOLDER
    if work.is_dir():
        units, done = len(list(work.glob("units/*"))), len(list(work.glob("done/*.json")))
        return (
            f"the cache at {folder} is half written ({done} of {units} units are done); "
            "run `teachercache precompute` with its recipe again to finish it"
        )
    return f"{folder} has no {MANIFEST}, so it is no cache; make one with `teachercache precompute RECIPE`"


def canonical_json(value: Any) -> bytes:
    """One byte string for equal values, whatever the order of keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def fingerprint_of(value: Any) -> str:
    """sha256 over the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _digest(data: dict[str, Any]) -> str:
    return fingerprint_of(data)


def hash_file(path: Path) -> str:
    """sha256 of a file, about 1.8 GB/s."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_info(folder: Path, path: Path) -> FileInfo:
    """Size and digest of a file of the cache at `folder`."""
    return FileInfo(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path))
