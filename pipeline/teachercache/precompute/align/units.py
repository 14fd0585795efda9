"""One shard of a cache to one of its alignment. No Ray, no order, no state: equal shards and tokenizers give equal files."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from teachercache.cache import Cache, write_shard
from teachercache.cache.alignment import TOKENIZER
from teachercache.cache.stores.copies import folder_of
from teachercache.cache.stores.store import Store
from teachercache.models.loading import load_tokenizer
from teachercache.precompute.align.plan import AlignPlan
from teachercache.precompute.align.rows import AlignedRow, Aligner
from teachercache.precompute.engine.records import put_record
from teachercache.stream.tokenizers import teacher_tokenizer

BATCH = 256  # rows that are tokenised in one call: bounds memory, changes no result


@dataclass(frozen=True)
class AlignReport:
    """Report of a shard's work; nothing of it is stored. `started` is wall clock."""

    tokens: int  # of the student
    started: float


def align_shard(plan: AlignPlan, unit: int) -> AlignReport:
    """Write the alignment of a shard's rows and, last, its record."""
    started = time.time()
    cache = _opened(plan.location, plan.units)
    aligner = _aligner(plan.store, plan.location, plan.units, plan.within, tuple(plan.tokenizer["prefix_ids"]))
    info = cache.manifest.shards[unit]
    rows: list[AlignedRow] = []
    for first in range(0, info.rows, BATCH):
        chosen = range(first, min(first + BATCH, info.rows))
        rows += aligner.aligned([cache.shard(unit).read_row(index, (), cache.recent) for index in chosen])
    shard, column_bytes = write_shard(
        plan.store,
        unit,
        rows=[item.row for item in rows],
        payload=[item.columns for item in rows],
        groups=(plan.group,),
    )
    totals: Counter[str] = Counter()
    for item in rows:
        totals.update(item.totals)
    record = {
        "shard": shard.to_json(),
        "column_bytes": column_bytes,
        "totals": dict(totals),
        "unaligned": dict(Counter(item.problem for item in rows if item.problem)),
        "longest": max(item.row.length for item in rows),
    }
    put_record(plan.store, plan.records().name(unit), record)
    return AlignReport(totals["student_tokens"], started)


@lru_cache(maxsize=1)
def _opened(location: str, shards: int) -> Cache:
    """The cache with so many shards: one that has grown since is opened again."""
    return Cache.open(location)


@lru_cache(maxsize=1)
def _aligner(store: Store, location: str, shards: int, alignment: str, student_prefix: tuple[int, ...]) -> Aligner:
    cache = _opened(location, shards)
    with folder_of(store, f"{alignment}/{TOKENIZER}") as folder:
        student = load_tokenizer(str(folder))
    return Aligner(
        teacher_tokenizer(cache),
        student,
        chats=bool(cache.manifest.corpus.get("messages_field")),
        teacher_prefix=cache.manifest.prefix_ids,
        student_prefix=student_prefix,
    )
