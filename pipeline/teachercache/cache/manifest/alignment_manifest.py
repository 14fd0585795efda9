"""alignment.json: what one alignment of a cache with a student's tokenizer holds, and the digest of each of its files.

    alignments/ID/
      alignment.json         written last, and whole; carries the digest of itself
      tokenizer/             the student's tokenizer files
      vocabulary-*.safetensors   which of its tokens stand for which of the teacher's
      part-00000-*.arrow …   one for each shard of the cache, its rows in the same order
      index/                 lists of these, as the cache has them

ID is the beginning of the tokenizer's fingerprint (of conversations, of it and the chat template's), so that an
alignment is found by the tokenizer that lies beside a student,
also where folders cannot be listed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from teachercache.bounded.strangers_json import parse_json
from teachercache.cache.files.bounds import (
    MOST_LENGTH,
    MOST_PREFIX,
    MOST_TOKENS,
    Count,
    check_files,
    check_sizes,
    validated,
)
from teachercache.cache.files.column_groups import Group
from teachercache.cache.files.digests import fingerprint_of
from teachercache.cache.files.entries import FileInfo, FileTable, ShardTable
from teachercache.cache.manifest import manifest_v1
from teachercache.cache.manifest.index import INDEX, Indexed, Read, read_index, remove_others, write_index
from teachercache.cache.manifest.manifest import UPGRADE, check_requires
from teachercache.cache.manifest.model import Manifest
from teachercache.cache.stores.store import Store
from teachercache.errors import CacheDamaged, CacheError
from teachercache.targets.coding.chunk_columns import ChunkColumns

ALIGNMENTS = "alignments"
ALIGNMENT = "alignment.json"
FORMAT = "teachercache-alignment"
FORMAT_VERSION = 2
_PLAIN_KEYS = (
    "cache", "tokenizer", "sequence_length", "vocabulary", "totals", "unaligned", "column_bytes", "created_by",
)  # fmt: skip


def reader_of(tokenizer_fingerprint: str, chat_template: str | None) -> str:
    """Returns the identity of a student's way of reading: its tokenizer and, for conversations, the fingerprint of its
    chat template."""
    if chat_template is None:
        return tokenizer_fingerprint
    return fingerprint_of({"tokenizer": tokenizer_fingerprint, "chat_template": chat_template})


def alignment_folder(reader: str) -> str:
    """Returns the folder, in a cache, of the alignment with a tokenizer (`reader_of`)."""
    return f"{ALIGNMENTS}/{reader[:16]}"


@dataclass(frozen=True)
class AlignmentManifest:
    """Typed view of alignment.json, of whichever version."""

    cache: str  # settings_fingerprint of the cache that it belongs to
    tokenizer: dict[str, Any]  # `name`, `fingerprint`, `vocabulary_size`, `pad_id`, `eos_id`, `chat_template` (or null)
    sequence_length: int  # most tokens in a row of the student's
    vocabulary: dict[str, Any]  # `file`, `begins_file`, `begins`, `coverage`, `identical`
    totals: dict[str, int]  # `rows`, `teacher_tokens`, `student_tokens`, `chunks`, `bytes`, `aligned_bytes`, …
    unaligned: dict[str, int]  # rows by the reason why they have no chunks
    shards: ShardTable
    files: list[FileInfo]
    column_bytes: dict[str, int]
    created_by: str
    index: tuple[FileInfo, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Fingerprint that its parts carry: equal for equal settings of caches and equal tokenizers."""
        return self.group.settings

    @property
    def group(self) -> Group:
        """Column group of its parts."""
        begins = self.tokenizer.get("prefix_ids", ())
        return alignment_group(self.cache, self.reader, prefix_ids=begins, format_version=self.format_version)

    @property
    def all_files(self) -> list[FileInfo]:
        """Every file that alignment.json and its index list, the index among them."""
        return [*self.shards.all_files(), *self.files, *self.index]

    @property
    def reader(self) -> str:
        """See `reader_of`."""
        return reader_of(self.tokenizer["fingerprint"], self.tokenizer["chat_template"])

    @property
    def folder(self) -> str:
        """Its folder in the cache."""
        return alignment_folder(self.reader)

    @property
    def vocabulary_size(self) -> int:
        """Tokens of the student's tokenizer."""
        return int(self.tokenizer["vocabulary_size"])

    @property
    def pad_id(self) -> int:
        """Token that fills up batches; never seen by a loss."""
        return int(self.tokenizer["pad_id"])

    def to_json(self, index: list[dict[str, Any]]) -> str:
        """The file's text, its own digest included; `index` are the entries of its index files."""
        data: dict[str, Any] = {
            **{key: getattr(self, key) for key in _PLAIN_KEYS},
            "format_version": FORMAT_VERSION,
            "requires": [],
            "parts": self.shards.totals(),
            "files": [vars(info) for info in self.files],
            "index": index,
        }
        return json.dumps({"format": FORMAT, **data, "digest": fingerprint_of(data)}, indent=1, sort_keys=True) + "\n"


def commit_alignment(manifest: AlignmentManifest, cache: Store) -> None:
    """Write the index files, then alignment.json of an alignment of the cache in a store; see `commit_manifest`."""
    within = f"{manifest.folder}/{INDEX}"
    index = write_index(cache, manifest.shards, [], within=within)
    cache.put(f"{manifest.folder}/{ALIGNMENT}", manifest.to_json(index).encode())
    remove_others(cache, index, within=within)


def alignment_group(
    cache: str, reader: str, *, prefix_ids: Sequence[int] = (), format_version: int = FORMAT_VERSION
) -> Group:
    """The one column group of an alignment's parts. Their settings follow from the settings_fingerprint of the cache, from how
    the student reads it and from what its segments begin with (nothing, or only where documents begin: earlier versions).
    Neither targets nor other shards of the cache are in it: what is added to a cache leaves alignments as they are."""
    begins = {"prefix_ids": list(prefix_ids)} if prefix_ids else {}
    if format_version == manifest_v1.FORMAT_VERSION:
        settings = fingerprint_of({"cache": cache, "reader": reader, "format_version": 1, **begins})
    else:
        settings = fingerprint_of({"settings": cache, "reader": reader, **begins})
    return Group(folder=alignment_folder(reader), columns=ChunkColumns.columns, settings=settings)


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


class AlignmentBehind(CacheError):
    """An alignment that lacks rows which the cache has got since."""


def parse_alignment(
    data: bytes, read_file: Read, *, cache: Manifest, name: str, behind: bool = False
) -> AlignmentManifest:
    """The manifest from the file's bytes, its index from those that `read_file(file, size)` gives; `name` is what errors call
    it.

    Of a cache that had fewer rows once (manifest/snapshots.py) it is that of these rows. Where the cache has got rows since, it
    lacks them: `AlignmentBehind`, unless `behind` allows for it. Raises `CacheDamaged` where it was changed, makes no sense or
    does not belong to the cache, `CacheError` for a format of a later version.
    """
    try:
        claims = parse_json(data)
        if claims.pop("format") != FORMAT:
            raise ValueError("it describes no alignment of teachercache")
        version, digest = claims["format_version"], claims.pop("digest")
        if type(version) is not int or version not in (manifest_v1.FORMAT_VERSION, FORMAT_VERSION):
            raise CacheError(
                f"{name} has format version {repr(version)[:80]}, this version of teachercache reads up to {FORMAT_VERSION}; "
                f"{UPGRADE}"
            )
        if digest != fingerprint_of(claims):
            raise ValueError("its digest does not match: it was edited or damaged")
        check_requires(claims, name=name)
        manifest = _built(claims, read_file, cache)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CacheDamaged(
            f"{name} cannot be trusted: {reason}; delete its folder and run `teachercache align`"
        ) from None
    if len(manifest.shards) < len(cache.shards) and not behind:
        raise AlignmentBehind(f"{name} lacks rows that the cache has by now; run `teachercache align` again")
    return manifest


def _built(data: dict[str, Any], read_file: Read, cache: Manifest) -> AlignmentManifest:
    validated(_Claims.model_validate, {name: data[name] for name in _Claims.model_fields})
    folder = alignment_folder(reader_of(data["tokenizer"]["fingerprint"], data["tokenizer"]["chat_template"]))
    if data["format_version"] == manifest_v1.FORMAT_VERSION:
        indexed = Indexed(manifest_v1.shards_of(data["shards"], group=folder), FileTable.of([]))
    else:
        indexed = read_index(data["index"], read_file, groups=[folder])
        if indexed.shards.totals() != {key: data["parts"][key] for key in indexed.shards.totals()}:
            raise ValueError("its totals are not those of its parts")
    manifest = AlignmentManifest(
        **{key: data[key] for key in _PLAIN_KEYS},
        shards=indexed.shards,
        files=FileTable.from_entries(data["files"])[:],
        index=indexed.index,
        format_version=data["format_version"],
    )
    _check(manifest, cache)
    if len(manifest.shards) <= len(cache.shards):
        return manifest
    return replace(manifest, shards=ShardTable.of(manifest.shards[: len(cache.shards)], groups=[folder]))


def _check(manifest: AlignmentManifest, cache: Manifest) -> None:
    names = [*manifest.shards.names(), *(info.file for info in (*manifest.files, *manifest.index))]
    for name in names:
        if not name.startswith(f"{manifest.folder}/"):
            raise ValueError(f"it names {name!r}, which is outside its folder")
    check_sizes(manifest.files)
    check_files(names)
    if manifest.tokenizer["pad_id"] >= manifest.vocabulary_size:
        raise ValueError("its pad_id is no token")
    if manifest.cache != cache.settings_fingerprint:
        raise ValueError("it belongs to another cache")
    shards, cached = manifest.shards, cache.shards
    both = slice(min(len(shards), len(cached)))  # shards are added at the end
    same = both.stop > 0 and all(
        np.array_equal(shards.counted(name)[both], cached.counted(name)[both]) for name in ("rows", "held_out_rows")
    )
    # Format 1 does not tell which rows a shard holds: joining compares them one by one.
    digests = zip(shards.row_ids[both], cached.row_ids[both], strict=True)
    if not same or any(digest and other and digest != other for digest, other in digests):
        raise ValueError("its rows are not those of the cache")
