"""The align job from a cache and a student's tokenizer to a committed alignment."""

from __future__ import annotations

import math
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from teachercache.cache import Cache
from teachercache.cache.files.entries import FileInfo, ShardInfo, ShardTable
from teachercache.cache.manifest.alignment_manifest import (
    ALIGNMENT,
    AlignmentManifest,
    commit_alignment,
    parse_alignment,
)
from teachercache.cache.stores.choice import store_at
from teachercache.cache.stores.lease import leased
from teachercache.cache.stores.store import place
from teachercache.config import PrecomputeConfig
from teachercache.errors import CacheError, JobFailed
from teachercache.files import full_disk_in_a_line
from teachercache.precompute.align.plan import AlignPlan, make_plan
from teachercache.precompute.engine.progress import progress_bar
from teachercache.precompute.engine.termination import ending_in_a_line
from teachercache.stream.beginnings import warnings_of
from teachercache.targets.coding.chunk_columns import ChunkColumns
from teachercache.version import __version__


def run_align(
    location: str | Path, *, student: str, revision: str | None = None, address: str | None = None, console: Console
) -> dict[str, Any]:
    """Align a cache with the tokenizer of `student`; returns the summary that `--json` prints.

    Run again, it resumes; a finished alignment is left as it is. Raises a `UserError` before any work for what cannot be
    aligned, `JobFailed` when the job could not be completed; what it finished is kept.
    """
    began = time.perf_counter()
    cache = Cache.open(location)
    if cache.is_snapshot:
        raise CacheError(f"{location} is the cache as it was: align {cache.folder}, which serves it too")
    for line in warnings_of([cache]):
        console.print(line, markup=False)
    console.print(
        f"planning: the tokenizer of {student} against that of {cache.manifest.teacher['model']} …", markup=False
    )
    tell = partial(console.print, markup=False)
    with (
        ending_in_a_line(),
        full_disk_in_a_line(location),
        leased(store_at(location), job="align job", tell=tell) as store,
    ):
        plan = make_plan(cache, student, revision=revision, store=store)
        seconds = 0.0
        if plan.is_finished():
            console.print(f"{plan.name} is complete: nothing to do", markup=False)
            remove_work(plan)  # of a job that was killed between its last two steps
        else:
            seconds = _run(plan, address, console)
            commit(plan, cache)
    file = f"{plan.within}/{ALIGNMENT}"
    manifest = parse_alignment(
        plan.store.get(file), cache.source.read_listed, cache=cache.manifest, name=place(plan.store, file)
    )
    result = summary(plan, manifest, working_seconds=seconds, seconds=time.perf_counter() - began)
    print_closing(console, result)
    return result


def _run(plan: AlignPlan, address: str | None, console: Console) -> float:
    """Seconds from the first shard's start to the last one's end."""
    for file in plan.records().recheck():
        told = f"{place(plan.store, file)} has other bytes than were written: its shard is aligned again"
        console.print(told, markup=False, soft_wrap=True)
    pending = plan.pending()
    if not pending:
        return 0.0
    if len(pending) < plan.units:
        console.print(f"resuming: {plan.units - len(pending)} of {plan.units} shards are done")
    from teachercache.precompute.engine.cluster import connected, run_tasks

    first, tokens = math.inf, 0
    with connected(PrecomputeConfig(address=address)), progress_bar(console) as progress:
        bar = progress.add_task("align", total=plan.units, completed=plan.units - len(pending), rate="")
        for done in run_tasks(_align_unit, plan, pending, what="shard"):
            first, tokens = min(first, done.started), tokens + done.tokens
            rate = f"{tokens:,} tokens, {tokens / max(1e-9, time.time() - first):,.0f}/s"
            progress.update(bar, advance=1, rate=rate)
    return time.time() - first


def _align_unit(plan: AlignPlan, unit: int) -> Any:
    from teachercache.precompute.align.units import align_shard

    return align_shard(plan, unit)


def commit(plan: AlignPlan, cache: Cache) -> None:
    """Write alignment.json, once every shard has its record; then the records go. Raises `JobFailed` where some have none,
    `CacheError` where no row could be aligned."""
    records = [record for _, record in sorted(plan.records().finished().items())]
    if len(records) < plan.units:
        raise JobFailed(
            f"{plan.units - len(records)} of {plan.units} shards have no alignment; run the same command again"
        )
    totals, unaligned, sizes = Counter[str](), Counter[str](), Counter[str]()
    for record in records:
        totals.update(record["totals"])
        unaligned.update(record["unaligned"])
        sizes.update(record["column_bytes"])
    shards = [ShardInfo.from_json(record["shard"]) for record in records]
    _check_rows(totals, shards, unaligned, plan, cache)
    _remove_leftovers(plan, {shard.file for shard in shards})
    manifest = AlignmentManifest(
        cache=plan.settings,
        tokenizer=plan.tokenizer,
        sequence_length=max(record["longest"] for record in records),
        vocabulary=plan.vocabulary,
        totals=dict(totals),
        unaligned=dict(unaligned),
        shards=ShardTable.of(shards, groups=[plan.within]),
        files=[FileInfo(**info) for info in plan.files],
        column_bytes=dict(sizes),
        created_by=f"teachercache {__version__}",
    )
    commit_alignment(manifest, plan.store)
    remove_work(plan)


def remove_work(plan: AlignPlan) -> None:
    """Remove what the job worked with, once alignment.json is there."""
    plan.store.delete(*plan.store.list(f"{plan.work}/"))
    plan.store.sweep(f"{plan.within}/")


def _check_rows(
    totals: Counter[str], shards: list[ShardInfo], unaligned: Counter[str], plan: AlignPlan, cache: Cache
) -> None:
    """Every row of the cache is in the alignment; a cache of which no row could be aligned is the user's to know of."""
    rows = sum(shard.rows for shard in shards)
    if rows != cache.manifest.rows:
        raise JobFailed(f"{cache.manifest.rows} rows, but shards account for {rows}; delete {plan.name} and run again")
    if unaligned.total() == totals["rows"]:
        reason, count = unaligned.most_common(1)[0]
        raise CacheError(
            f"none of the {rows} rows could be aligned with {plan.tokenizer['name']}; {count} of them: {reason}; take a "
            "student that reads them"
        )


def _remove_leftovers(plan: AlignPlan, kept: set[str]) -> None:
    """Remove what killed writers left, and parts of those that came second: whatever neither plan nor record names."""
    kept = kept | {info["file"] for info in plan.files}
    found = plan.store.list(f"{plan.within}/")
    plan.store.delete(*(name for name in found if name not in kept and not name.startswith(f"{plan.work}/")))


def summary(plan: AlignPlan, manifest: AlignmentManifest, *, working_seconds: float, seconds: float) -> dict[str, Any]:
    """Sums up the job's result; `aligned_fraction` is of the bytes of the cache's text, `chunks` stand for the same
    bytes on both sides."""
    totals = Counter(manifest.totals)
    tokens = max(1, totals["student_tokens"])
    beside = sum(manifest.column_bytes.get(column.name, 0) for column in ChunkColumns.columns)
    return {
        "cache": plan.location,
        "alignment": plan.name,
        "student": manifest.tokenizer["name"],
        "rows": totals["rows"],
        "rows_without_chunks": sum(manifest.unaligned.values()),
        "unaligned": manifest.unaligned,
        "rows_by_characters": totals["rows_by_characters"],
        "teacher_tokens": totals["teacher_tokens"],
        "student_tokens": totals["student_tokens"],
        "positions": totals["positions"],
        "chunks": totals["chunks"],
        "aligned_fraction": round(totals["aligned_bytes"] / max(1, totals["bytes"]), 6),
        "vocabulary_coverage": manifest.vocabulary["coverage"],
        "vocabulary_identical": manifest.vocabulary["identical"],
        "bytes": int(manifest.shards.sizes().sum()),
        "bytes_per_token": round(beside / tokens, 3),
        "working_seconds": round(working_seconds, 2),
        "seconds": round(seconds, 2),
    }


def print_closing(console: Console, result: dict[str, Any]) -> None:
    """Print what the job made, and why rows have no chunks."""
    console.print(
        f"aligned {result['rows'] - result['rows_without_chunks']:,} of {result['rows']:,} rows with {result['student']}: "
        f"{result['student_tokens']:,} of its tokens for {result['teacher_tokens']:,} of the teacher's, "
        f"{result['chunks']:,} chunks over {result['aligned_fraction']:.2%} of the bytes; "
        f"{result['vocabulary_coverage']:.1%} of the teacher's tokens have one of the same bytes → {result['alignment']}",
        markup=False,
        soft_wrap=True,
    )
    for reason, count in result["unaligned"].items():
        console.print(f"warning: {count} rows have no chunks: {reason}", markup=False, soft_wrap=True)


__all__ = ["commit", "run_align", "summary"]
