"""`CacheAlignment`: a cache's rows in the tokens of one student, aligned with the teacher's; matched with the cache's by id."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachercache.cache.files.bounds import MOST_CALIBRATION_BYTES
from teachercache.cache.files.entries import FileInfo, ShardInfo
from teachercache.cache.manifest.alignment_manifest import (
    ALIGNMENT,
    ALIGNMENTS,
    AlignmentBehind,
    AlignmentManifest,
    alignment_folder,
    parse_alignment,
    reader_of,
)
from teachercache.cache.reader import Cache
from teachercache.cache.shards.shard import Shard, StoredRow
from teachercache.cache.shards.shard_set import ShardSet, Split
from teachercache.cache.storage.source import loadable, private_folder
from teachercache.cache.token_texts import listed_token_texts
from teachercache.errors import CacheDamaged, CacheError
from teachercache.targets.coding.chunk_columns import ChunkColumns
from teachercache.targets.logits.boundary_mass import BoundaryMass
from teachercache.tokens.vocabulary_map import VocabularyMap

TOKENIZER = "tokenizer"  # folder of the student's tokenizer files


class CacheAlignment(ShardSet):
    """The alignment of a cache with one student's tokenizer. Row `index` of a split is that row of the cache."""

    def __init__(self, cache: Cache, manifest: AlignmentManifest) -> None:
        super().__init__(manifest.shards, cache.source)
        self.manifest = manifest
        self._cache_name, self._teacher_tokens = cache.name, cache.manifest.vocabulary_size
        self._vocabulary: VocabularyMap | None = None
        self._begins_V: NDArray[np.bool_] | None = None

    @classmethod
    def open(
        cls, cache: Cache, tokenizer_fingerprint: str, *, student: str, chat_template: str | None = None
    ) -> CacheAlignment:
        """The alignment with the tokenizer of this fingerprint, and of conversations with the chat template of that one;
        messages call it `student`.

        Raises `CacheError` when there is none, `CacheDamaged` when it cannot be trusted.
        """
        reader = reader_of(tokenizer_fingerprint, chat_template)
        name = f"{alignment_folder(reader)}/{ALIGNMENT}"
        data = cache.source.read(name)
        if data is None:
            raise CacheError(
                f"{cache.name} has no alignment with the tokenizer of {student}; make it, without the teacher: "
                f"`teachercache align {cache.name} --student {student}`"
            )
        manifest = parse_alignment(data, cache.source.read_listed, cache=cache.manifest, name=f"{cache.name}/{name}")
        if manifest.reader != reader:
            raise CacheDamaged(f"{cache.name}/{name} is of another tokenizer; delete its folder and align again")
        return cls(cache, manifest)

    @classmethod
    def all_of(cls, cache: Cache) -> list[CacheAlignment]:
        """Every alignment of a cache with all of its rows. Raises `CacheDamaged` for one that cannot be trusted."""
        alignments = []
        for name in cache.source.names(ALIGNMENTS):
            data = cache.source.read(name) if name.count("/") == 2 and name.endswith(f"/{ALIGNMENT}") else None
            if data is not None:
                read = cache.source.read_listed
                with contextlib.suppress(AlignmentBehind):  # the cache has grown since
                    manifest = parse_alignment(data, read, cache=cache.manifest, name=f"{cache.name}/{name}")
                    alignments.append(cls(cache, manifest))
        return alignments

    @property
    def vocabulary(self) -> VocabularyMap:
        """Map from the student's tokens to the teacher's; loaded once."""
        if self._vocabulary is None:
            with loadable(self.source, self._info("file"), most=MOST_CALIBRATION_BYTES) as path:
                vocabulary = VocabularyMap.load(path)
            sizes = len(vocabulary.first_Vt), len(vocabulary.emitted_Vs)
            if sizes != (self._teacher_tokens, self.manifest.vocabulary_size):
                raise CacheDamaged(f"{self._cache_name}: its vocabulary map is of other vocabularies; align again")
            self._vocabulary = vocabulary
        return self._vocabulary

    @property
    def begins_V(self) -> NDArray[np.bool_]:
        """Marks the student's tokens that begin a new pre-token, [V]."""
        if self._begins_V is None:
            described = self.manifest.vocabulary["begins"]
            mass = BoundaryMass.from_settings(described, vocabulary_size=self.manifest.vocabulary_size)
            with loadable(self.source, self._info("begins_file"), most=MOST_CALIBRATION_BYTES) as path:
                self._begins_V = mass.with_set(path).begins_V
        assert self._begins_V is not None
        return self._begins_V

    def _info(self, role: str) -> FileInfo:
        name = self.manifest.vocabulary[role]
        info = next((info for info in self.manifest.files if info.file == name), None)
        if info is None:
            raise CacheDamaged(f"{self._cache_name}: its alignment lists no {name}; align again")
        return info

    def tokenizer_folder(self) -> AbstractContextManager[Path]:
        """The student's tokenizer files, as `Cache.teacher_folder` gives the teacher's."""
        return private_folder(self.source, self._tokenizer_files, within=self._tokenizer_within)

    def token_texts(self) -> dict[int, str]:
        """Readable texts of the student's tokens by id."""
        return listed_token_texts(self.source, self._tokenizer_files, within=self._tokenizer_within)

    @property
    def _tokenizer_within(self) -> str:
        return f"{self.manifest.folder}/{TOKENIZER}"

    @property
    def _tokenizer_files(self) -> list[FileInfo]:
        return [info for info in self.manifest.files if info.file.startswith(f"{self._tokenizer_within}/")]

    def opened(self, info: ShardInfo, mapped: Callable[[FileInfo], pa.MemoryMappedFile]) -> Shard:
        """See `ShardSet`."""
        return Shard(
            info,
            mapped,
            groups=(self.manifest.group,),
            payload=ChunkColumns(),
            vocabulary_size=self.manifest.vocabulary_size,
            longest=self.manifest.sequence_length,
        )

    def aligned_row(self, split: Split, index: int, of: StoredRow, *, segments: bool = True) -> StoredRow:
        """The row in the student's tokens that belongs to the row `of` of the cache, which stands at the same place.

        Raises `CacheDamaged` where it belongs to another row, or its chunks do not hold the teacher's tokens.
        """
        row = self.read_row(split, index, segments=segments)
        if row.row.row_id != of.row.row_id:
            raise CacheDamaged(
                f"{self._cache_name}: its alignment has row {row.row.row_id} in the place of {of.row.row_id}; align again"
            )
        counted = int(row.targets["teacher_counts"].sum(dtype=np.int64))
        if counted != of.row.length:
            raise CacheDamaged(
                f"{self._cache_name}: row {of.row.row_id} has {of.row.length} tokens, its alignment holds {counted}; "
                "align again"
            )
        return row
