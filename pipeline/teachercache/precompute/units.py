"""One work unit through its three stages. Plain functions of the unit and the job: no Ray, no order, no state.

    tokenise_unit → capture_unit → write_unit

Shards hold no time and no name of a machine, so equal units give equal files.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from teachercache.config import SequenceConfig
from teachercache.corpus.sequences import Quarantined, Tokenised, tokenise
from teachercache.models import load_tokenizer
from teachercache.precompute.plan import Plan, read_unit
from teachercache.shards import write_shard
from teachercache.shards.manifest import file_info
from teachercache.teacher import Captured, Teacher


@dataclass(frozen=True, eq=False)
class CapturedUnit:
    """What the teacher made of a unit."""

    tokenised: Tokenised
    documents: int
    captured: list[Captured]
    started: float  # wall clock
    seconds: float


def tokenise_unit(plan: Plan, unit: int, *, sequence: SequenceConfig, store_text: bool) -> tuple[Tokenised, int]:
    """Staged documents to token rows, and how many documents there were."""
    staged = read_unit(plan.unit_file(unit))
    tokenizer = _tokenizer(str(plan.folder / "teacher"))
    return tokenise(staged, tokenizer=tokenizer, sequence=sequence, store_text=store_text), len(staged)


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Any:
    return load_tokenizer(folder)


def capture_unit(teacher: Teacher, tokenised: Tokenised, documents: int, *, positions_per_batch: int) -> CapturedUnit:
    """The teacher's targets of a unit's rows."""
    started, start = time.time(), time.perf_counter()
    captured = teacher.capture(tokenised.rows, positions_per_batch=positions_per_batch)
    return CapturedUnit(tokenised, documents, captured, started, time.perf_counter() - start)


def write_unit(plan: Plan, unit: int, result: CapturedUnit, *, teacher: dict[str, Any]) -> dict[str, Any]:
    """Shard, quarantine file and, last, the record; returns the record."""
    stored = [item for item in result.captured if item.columns is not None]
    quarantined = [*result.tokenised.quarantined, *_quarantined_rows(result.captured)]
    record: dict[str, Any] = {
        "documents": result.documents,
        "quarantined_documents": len({(item.source_id, item.occurrence) for item in quarantined}),
        "windowed_documents": result.tokenised.windowed_documents,
        "extra_windows": result.tokenised.extra_windows,
        "windows_without_targets": result.tokenised.windows_without_targets,
        "teacher": teacher,
        "shard": None,
        "quarantine": None,
        "column_bytes": {},
    }
    if stored:
        shard, record["column_bytes"] = write_shard(
            plan.folder,
            f"part-{unit:05d}.arrow",
            rows=[item.row for item in stored],
            payload=[item.columns or {} for item in stored],
            columns=plan.kind.columns,
            fingerprint=plan.fingerprint,
        )
        record["shard"] = vars(shard)
    if quarantined:
        record["quarantine"] = vars(_write_quarantine(plan, unit, quarantined))
    _write_text(plan.record_file(unit), json.dumps(record, sort_keys=True))
    return record


def _quarantined_rows(captured: list[Captured]) -> list[Quarantined]:
    """A row without targets takes all its documents with it into quarantine, once each."""
    return [
        Quarantined(segment.source_id, segment.occurrence, item.problem, (segment.text or "")[:200])
        for item in captured
        if item.problem is not None
        for segment in item.row.segments
    ]


def _write_quarantine(plan: Plan, unit: int, quarantined: list[Quarantined]) -> Any:
    path = plan.folder / "quarantine" / f"part-{unit:05d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    _write_text(path, "".join(json.dumps(vars(item), sort_keys=True) + "\n" for item in quarantined))
    return file_info(plan.folder, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
