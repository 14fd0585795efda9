"""alignment.json: what one alignment of a cache with a student's tokenizer holds, and the digest of each of its files.

    alignments/ID/
      alignment.json         written last, by temp file and rename; carries the digest of itself
      tokenizer/             the student's tokenizer files
      vocabulary-*.safetensors   which of its tokens stand for which of the teacher's
      part-00000.arrow …     one for each shard of the cache, its rows in the same order

ID is the beginning of the tokenizer's fingerprint (of conversations, of it and the chat template's), so that an
alignment is found by the tokenizer that lies beside a student,
also where folders cannot be listed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from teachercache.errors import CacheDamaged, CacheError
from teachercache.shards.claims import MOST_LENGTH, MOST_PREFIX, MOST_TOKENS, Count, check_files, validated
from teachercache.shards.manifest import FileInfo, Manifest, ShardInfo, check_inside, fingerprint_of

ALIGNMENTS = "alignments"
SIDECAR = "alignment.json"
FORMAT = "teachercache-alignment"
FORMAT_VERSION = 1


def reader_of(tokenizer_fingerprint: str, chat_template: str | None) -> str:
    """What decides how a student reads a cache: its tokenizer and, of conversations, the fingerprint of its chat template."""
    if chat_template is None:
        return tokenizer_fingerprint
    return fingerprint_of({"tokenizer": tokenizer_fingerprint, "chat_template": chat_template})


def sidecar_folder(reader: str) -> str:
    """Where the alignment with a tokenizer (`reader_of`) lies in a cache."""
    return f"{ALIGNMENTS}/{reader[:16]}"


@dataclass(frozen=True)
class SidecarManifest:
    """Typed view of alignment.json."""

    cache: str  # fingerprint of the cache that it belongs to
    tokenizer: dict[str, Any]  # `name`, `fingerprint`, `vocabulary_size`, `pad_id`, `eos_id`, `chat_template` (or null)
    sequence_length: int  # most tokens in a row of the student's
    vocabulary: dict[str, Any]  # `file`, `begins_file`, `begins`, `coverage`, `identical`
    totals: dict[str, int]  # `rows`, `teacher_tokens`, `student_tokens`, `chunks`, `bytes`, `aligned_bytes`, …
    unaligned: dict[str, int]  # rows by the reason why they have no chunks
    shards: list[ShardInfo]
    files: list[FileInfo]
    column_bytes: dict[str, int]
    created_by: str
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """What its shards carry: equal for equal caches and tokenizers."""
        return sidecar_fingerprint(self.cache, self.reader, prefix_ids=self.tokenizer.get("prefix_ids", ()))

    @property
    def reader(self) -> str:
        """See `reader_of`."""
        return reader_of(self.tokenizer["fingerprint"], self.tokenizer["chat_template"])

    @property
    def folder(self) -> str:
        """Where it lies in the cache."""
        return sidecar_folder(self.reader)

    @property
    def vocabulary_size(self) -> int:
        """Tokens of the student's tokenizer."""
        return self.tokenizer["vocabulary_size"]

    @property
    def pad_id(self) -> int:
        """Token that fills up batches; never seen by a loss."""
        return self.tokenizer["pad_id"]

    def to_json(self) -> str:
        """The file's text, its own digest included."""
        data = dataclasses.asdict(self)
        return json.dumps({"format": FORMAT, **data, "digest": fingerprint_of(data)}, indent=1, sort_keys=True) + "\n"


def sidecar_fingerprint(cache: str, reader: str, *, prefix_ids: Sequence[int] = ()) -> str:
    """Of an alignment, from those of its cache, of how the student reads it and what its segments begin with (nothing, or only
    where documents begin: earlier versions)."""
    begins = {"prefix_ids": list(prefix_ids)} if prefix_ids else {}
    return fingerprint_of({"cache": cache, "reader": reader, "format_version": FORMAT_VERSION, **begins})


class _Tokenizer(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    name: str
    fingerprint: str = Field(min_length=16, pattern="^[0-9a-f]+$")
    chat_template: str | None
    vocabulary_size: int = Field(ge=1, le=MOST_TOKENS)
    pad_id: int = Field(ge=0, lt=MOST_TOKENS)
    prefix_ids: list[Annotated[int, Field(ge=0, lt=MOST_TOKENS)]] = Field([], max_length=MOST_PREFIX)


class _Begins(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    tokens: Count
    set: str


class _Vocabulary(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    file: str
    begins_file: str
    begins: _Begins
    coverage: float
    identical: bool


class _Claims(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    cache: str
    tokenizer: _Tokenizer
    sequence_length: Annotated[int, Field(ge=1, le=MOST_LENGTH)]
    vocabulary: _Vocabulary
    totals: dict[str, Count]
    unaligned: dict[str, Count]
    column_bytes: dict[str, Count]
    created_by: str


def parse_sidecar(data: bytes, *, cache: Manifest, name: str) -> SidecarManifest:
    """The manifest from the file's bytes; `name` is what errors call it.

    Raises `CacheDamaged` where it was changed, makes no sense or does not belong to the cache, `CacheError` for a format of a
    later version.
    """
    try:
        claims = json.loads(data)
        if claims.pop("format") != FORMAT:
            raise ValueError("it describes no alignment of teachercache")
        version, digest = claims["format_version"], claims.pop("digest")
        if version != FORMAT_VERSION:
            raise CacheError(
                f"{name} has format version {version}, this version of teachercache reads {FORMAT_VERSION}; align again"
            )
        if digest != fingerprint_of(claims):
            raise ValueError("its digest does not match: it was edited or damaged")
        return _build(claims, cache)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheDamaged(
            f"{name} cannot be trusted: {error}; delete its folder and run `teachercache align`"
        ) from None


def _build(data: dict[str, Any], cache: Manifest) -> SidecarManifest:
    data["shards"] = [ShardInfo(**shard) for shard in data["shards"]]
    data["files"] = [FileInfo(**file) for file in data["files"]]
    manifest = SidecarManifest(**data)
    validated(_Claims.model_validate, {name: data[name] for name in _Claims.model_fields})
    for entry in [*manifest.shards, *manifest.files]:
        check_inside(entry.file)
        if not entry.file.startswith(f"{manifest.folder}/"):
            raise ValueError(f"it names {entry.file!r}, which is outside its folder")
    check_files(manifest.shards, manifest.files)
    if manifest.tokenizer["pad_id"] >= manifest.vocabulary_size:
        raise ValueError("its pad_id is no token")
    if manifest.cache != cache.fingerprint:
        raise ValueError("it belongs to another cache")
    rows = [(shard.rows, shard.held_out_rows) for shard in cache.shards]
    if [(shard.rows, shard.held_out_rows) for shard in manifest.shards] != rows:
        raise ValueError("its rows are not those of the cache")
    return manifest
