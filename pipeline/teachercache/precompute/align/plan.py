"""Plan of an align job: a cache, a student's tokenizer, and the shards that are done.

alignments/ID/.work/ holds plan.json and a record for each shard that is done, and is gone once alignment.json is
committed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from teachercache.cache import Cache
from teachercache.cache.alignment import TOKENIZER
from teachercache.cache.files.bounds import Count
from teachercache.cache.files.column_groups import Group
from teachercache.cache.manifest.alignment_manifest import (
    ALIGNMENT,
    FORMAT_VERSION,
    alignment_folder,
    alignment_group,
    reader_of,
)
from teachercache.cache.manifest.manifest import WORK_FOLDER
from teachercache.cache.shards.shard_set import Split
from teachercache.cache.stores.choice import store_at
from teachercache.cache.stores.copies import put_folder, scratch_folder
from teachercache.cache.stores.store import Store, holds, place
from teachercache.errors import CacheDamaged, CacheError, ModelError
from teachercache.models.loading import load_tokenizer, portable_name, save_tokenizer
from teachercache.precompute.align.turns import with_turn_ends
from teachercache.precompute.engine.records import (
    File,
    Records,
    Shard,
    check_unchanged,
    read_json,
    read_shaped,
)
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.targets.logits.boundary_mass import BoundaryMass
from teachercache.tokens.carried_prefix import readers_prefix, with_prefix
from teachercache.tokens.fingerprint import (
    require_fast,
    template_fingerprint,
    tokenizer_fingerprint,
    vocabulary_size,
)
from teachercache.tokens.pretokens import begins_pretoken
from teachercache.tokens.vocabulary_map import VocabularyMap, vocabulary_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY = "vocabulary.safetensors"
RECORDS = 2  # version of what plan.json and records hold; those of 1 did not say it
FIRST_ROWS = 256  # of which one must say where its messages stand


class Vocabulary(TypedDict):
    """As alignment.json has it."""

    file: str
    begins_file: str
    begins: dict[str, Any]
    coverage: float
    identical: bool


class Planned(TypedDict):
    """plan.json. `files` are those that all shards share."""

    identity: dict[str, Any]
    vocabulary: Vocabulary
    files: list[File]


class Record(TypedDict):
    """Record of a shard that is done."""

    shard: Shard
    column_bytes: dict[str, Count]
    totals: dict[str, Count]
    unaligned: dict[str, Count]
    longest: Count


PLANNED: TypeAdapter[Any] = TypeAdapter(Planned)
RECORD: TypeAdapter[Any] = TypeAdapter(Record)


@dataclass(frozen=True)
class AlignPlan:
    """A planned job; travels to the workers."""

    store: Store  # of the cache
    location: str  # of the cache, as `Cache.open` takes it
    tokenizer: dict[str, Any]  # as alignment.json has it
    vocabulary: dict[str, Any]
    units: int  # shards
    settings: str  # settings_fingerprint of the cache
    files: list[dict[str, Any]] = field(default_factory=list)  # that all shards share: file, bytes, sha256

    @property
    def within(self) -> str:
        """Folder of the alignment, inside the cache."""
        return alignment_folder(self._reader)

    @property
    def name(self) -> str:
        """The name by which messages call that folder."""
        return place(self.store, self.within)

    @property
    def group(self) -> Group:
        """Column group of its parts."""
        return alignment_group(self.settings, self._reader, prefix_ids=self.tokenizer["prefix_ids"])

    @property
    def _reader(self) -> str:
        return reader_of(self.tokenizer["fingerprint"], self.tokenizer["chat_template"])

    @property
    def work(self) -> str:
        """Folder of the records of an unfinished job, inside the cache."""
        return f"{self.within}/{WORK_FOLDER}"

    def records(self) -> Records:
        """Records of shards that are done, each written once the shard's file is in place."""

        def counts(name: str, record: dict[str, Any]) -> bool:
            if set(record["shard"]["files"]) != {self.within}:
                raise CacheDamaged(
                    f"{place(self.store, name)} is of another alignment; delete it and run the same command again: this "
                    "shard is aligned again"
                )
            return True

        return Records(self.store, self.work, self.units, RECORD, counts)

    def pending(self) -> list[int]:
        """Shards that are still to be aligned; records that do not count are removed, so that others can take their place."""
        return self.records().pending()

    def is_finished(self) -> bool:
        """Tells whether alignment.json is there, with as many parts as the cache has shards by now."""
        found = read_json(self.store, f"{self.within}/{ALIGNMENT}")
        if not isinstance(found, dict) or not isinstance(parts := found.get("parts"), dict):
            return found is not None  # of format 1, or what its reader refuses
        return bool(parts.get("shards") == self.units)


def make_plan(cache: Cache, student: str, *, revision: str | None = None, store: Store | None = None) -> AlignPlan:
    """Check what can be known before any work, and write what all shards share: tokenizer files and the vocabulary map;
    `store` is that of the cache, if its location is not to be opened for it.

    Raises `ModelError` for a tokenizer that cannot be used, `CacheError` for a cache without text, for the teacher's own
    tokenizer, and where a link would lead what is written out of the cache.
    """
    chats = bool(cache.manifest.corpus.get("messages_field"))
    tokenizer = require_fast(load_tokenizer(student, revision=revision))
    check_tokenizer(tokenizer, student, teacher_fingerprint=cache.manifest.tokenizer_fingerprint, chats=chats)
    prefix = cache.manifest.row_prefix
    tokenizer = with_prefix(tokenizer, prefix, chats=chats)
    if not cache.manifest.corpus.get("store_text", True):
        raise CacheError(
            f"{cache.name} keeps no text (corpus.store_text: false), so nothing can be aligned; precompute it again with "
            "corpus.store_text: true"
        )
    settings = {
        "name": portable_name(student),
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocabulary_size": vocabulary_size(tokenizer),
        "pad_id": _first_of(tokenizer.pad_token_id, tokenizer.eos_token_id, 0),
        "eos_id": tokenizer.eos_token_id,
        "chat_template": template_fingerprint(tokenizer) if chats else None,
        "prefix_ids": list(readers_prefix(tokenizer, prefix, chats=chats)),
    }
    if chats and not _has_contents(cache):
        raise CacheError(
            f"{cache.name} does not say where messages stand in its conversations (an earlier version made it), so that "
            "no other chat template can be applied; precompute it again"
        )
    store, units = store or store_at(cache.source.location), len(cache.infos)
    plan = AlignPlan(store, cache.source.location, settings, {}, units, cache.manifest.settings_fingerprint)
    if plan.is_finished():
        return plan
    return _prepared(plan, cache, tokenizer)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, student: str, *, teacher_fingerprint: str, chats: bool) -> None:
    """Raise `CacheError` for the teacher's own tokenizer, `ModelError` for one that cannot read conversations."""
    if tokenizer_fingerprint(tokenizer) == teacher_fingerprint:
        raise CacheError(
            f"{student} has the teacher's own tokenizer: it trains from the cache as it is, without alignment"
        )
    if chats and template_fingerprint(tokenizer) is None:
        raise ModelError(
            f"the cache holds conversations, and the tokenizer of {student} has no chat template; take a chat model's"
        )


def _has_contents(cache: Cache) -> bool:
    """By its first rows: a window may hold markup alone, or what a template has changed."""
    split: Split = "train" if cache.rows_of("train") else "held-out"
    rows = (cache.read_row(split, index, columns=()).row for index in range(min(FIRST_ROWS, cache.rows_of(split))))
    return any(segment.contents for row in rows for segment in row.segments)


def _prepared(plan: AlignPlan, cache: Cache, tokenizer: PreTrainedTokenizerBase) -> AlignPlan:
    """With the files that all shards share; what an earlier job left is kept if it was the same."""
    versions = {"format_version": FORMAT_VERSION, "records": RECORDS}
    identity = {"cache": cache.manifest.fingerprint, "tokenizer": plan.tokenizer, **versions}
    file, remedy = f"{plan.work}/plan.json", f"delete {plan.name} and run this command again"
    another = _is_another_job(read_json(plan.store, file), identity)
    known = None if another else read_shaped(plan.store, file, PLANNED, remedy=remedy)
    if known is None:
        # What there is of a cache that has grown since serves until the new alignment.json is there.
        grown = holds(plan.store, f"{plan.within}/{ALIGNMENT}")
        plan.store.delete(*plan.store.list(f"{plan.work if grown else plan.within}/"))
        known = {"identity": identity, **_shared(plan, cache, tokenizer)}
        plan.store.put(file, json.dumps(known, sort_keys=True).encode())
    check_unchanged(plan.store, known["files"], remedy=remedy)
    return replace(plan, vocabulary=known["vocabulary"], files=known["files"])


def _shared(plan: AlignPlan, cache: Cache, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write what all shards share; returns it as plan.json has it."""
    teacher = teacher_tokenizer(cache)
    mapped = vocabulary_map(teacher, tokenizer)
    if plan.tokenizer["chat_template"] is not None:
        mapped = with_turn_ends(mapped, teacher, tokenizer)
    begins = BoundaryMass.of(begins_pretoken(tokenizer, cut_as=teacher))
    with scratch_folder() as folder:
        save_tokenizer(folder / TOKENIZER, tokenizer, fingerprint=plan.tokenizer["fingerprint"])
        mapped.save(folder / VOCABULARY)
        begins.save(folder)
        files = put_folder(plan.store, folder, plan.within)
    return {"vocabulary": _describe(plan, mapped, begins), "files": [vars(info) for info in files]}


def _is_another_job(known: Any, identity: Mapping[str, Any]) -> bool:
    """Tells whether a plan.json is of another job, or of an earlier version, which had it in another shape: no teacher
    was run for it, so that it is begun anew."""
    planned = known.get("identity") if isinstance(known, dict) else None
    return isinstance(planned, dict) and planned != identity


def _describe(plan: AlignPlan, mapped: VocabularyMap, begins: BoundaryMass) -> dict[str, Any]:
    files = {"file": f"{plan.within}/{VOCABULARY}", "begins_file": f"{plan.within}/{begins.file}"}
    return {**files, "begins": begins.settings(), "coverage": mapped.coverage, "identical": mapped.identical}


def _first_of(*ids: int | None) -> int:
    return next(number for number in ids if number is not None)
