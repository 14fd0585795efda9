"""One work unit through its second stage: teacher, shard, record. Plain functions of the unit and the job: no Ray, no order,
no state. The first one is in unit_tokens.py.

Shards hold no time and no name of a machine, so equal units give equal files.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from teachercache.cache import write_shard
from teachercache.cache.files.entries import ShardInfo
from teachercache.cache.manifest.model import QUARANTINE
from teachercache.cache.stores.copies import put_folder, scratch_folder
from teachercache.cache.stores.named import put_named
from teachercache.cache.stores.store import Store
from teachercache.config import PrecomputeConfig, SequenceConfig
from teachercache.corpus.sequences import Quarantined, Tokenised, tokenise
from teachercache.precompute.capture.input_form import check_input
from teachercache.precompute.capture.plan import CALIBRATION_FILE, TEACHER, Plan
from teachercache.precompute.capture.unit_tokens import tokenizer_of
from teachercache.precompute.engine.records import put_record
from teachercache.precompute.planning.sample import salted_hash
from teachercache.stage_times import measured, stage
from teachercache.targets import LayerFile, SketchBasis, calibrates
from teachercache.targets.stored import LOGITS
from teachercache.teacher import Captured, Teacher
from teachercache.tokens.rows import TokenRow


def calibrate(
    teacher: Teacher,
    plan: Plan,
    *,
    sequence: SequenceConfig,
    positions_per_batch: int,
    without: Collection[str] = (),
) -> None:
    """Make what targets are read by from rows drawn from the whole corpus by content hash; writes basis and layer files, then
    the record of them.

    At most half of what the drawn documents hold is used, so that rows remain on which fidelity can be measured. Rows whose id
    is among `without` are left out: the teacher fails on them.
    """
    check_input(teacher, plan, positions_per_batch=positions_per_batch)
    rows = [row for row in calibration_rows(plan, sequence=sequence) if row.row_id not in without]
    layers = teacher.prepare(rows, positions_per_batch=positions_per_batch, longest=sequence.length)
    basis = teacher.kind.basis if calibrates(teacher.kind) else None
    files: list[tuple[str, str, LayerFile | SketchBasis]]
    files = [(section, "layers", file) for section, file in layers.items()]
    files += [(LOGITS, "basis", basis)] if basis is not None else []
    record: dict[str, Any] = {
        "read_by": {section: {role: put_made(plan.store, file)} for section, role, file in files},
        "positions": sum(row.positions for row in rows),
        "rows": sorted(row.row_id for row in rows),
        "sources": sorted({segment.source_id for row in rows for segment in row.segments}),
        "job": plan.job,
    }
    if basis is not None and basis.chosen is not None:
        record["chosen"] = basis.chosen
    plan.store.put(CALIBRATION_FILE, json.dumps(record, sort_keys=True).encode())


def put_made(store: Store, file: LayerFile | SketchBasis) -> str:
    """Write a file that targets are read by; returns its name in the cache."""
    with scratch_folder() as folder:
        file.save(folder)
        [info] = put_folder(store, folder, TEACHER)
    return info.file


def calibration_rows(plan: Plan, *, sequence: SequenceConfig) -> list[TokenRow]:
    """The rows that calibration draws."""
    tokenised = tokenise(
        plan.sample(),
        tokenizer=tokenizer_of(plan.store),
        sequence=sequence,
        store_text=False,
        prefix=plan.prefix_ids,
    )
    rows = sorted((row for row in tokenised.rows if row.positions), key=lambda row: salted_hash(row.row_id))
    wanted = min(plan.targets.calibration_positions, sum(row.positions for row in rows) // 2)
    taken = np.cumsum([row.positions for row in rows])
    return rows[: int(np.searchsorted(taken, wanted)) + 1]


def actor_threads(settings: PrecomputeConfig) -> int:
    """CPU threads of one teacher actor. They decide the last bit of its logits, so the number of actors must not change
    them: without a setting an actor takes all cores that it may run on."""
    return settings.threads_per_actor or len(os.sched_getaffinity(0))


def compute_unit(
    teacher: Teacher,
    plan: Plan,
    unit: int,
    tokenised: Tokenised,
    *,
    documents: int,
    positions_per_batch: int,
    lost: Mapping[str, str] = MappingProxyType({}),
) -> UnitReport:
    """Capture a unit's rows and write them: shard, quarantine file and, last, the record. Rows of an id in `lost` are not read:
    they go to quarantine for the reason that it says.

    Both happen where the teacher is: payloads of hundreds of MB stay in one process.
    """
    check_input(teacher, plan, positions_per_batch=positions_per_batch)
    started, halved = time.time(), teacher.batches_halved
    teacher.drift.reset()
    rows = [row for row in tokenised.rows if row.row_id not in lost]
    with measured() as seconds:
        with stage("forward"):
            captured = teacher.capture(rows, positions_per_batch=positions_per_batch)
        teacher.on_batch([])
        captured += [Captured(row, None, lost[row.row_id]) for row in tokenised.rows if row.row_id in lost]
        with stage("encoding"):
            record = write_unit(plan, unit, tokenised, captured, documents=documents, teacher=teacher)
    shard = ShardInfo.from_json(record["shard"]) if record["shard"] else None
    made = (0, 0, 0) if shard is None else (shard.rows, shard.positions, shard.bytes)
    return UnitReport(unit, documents, *made, started, dict(seconds), teacher.batches_halved - halved)


@dataclass(frozen=True)
class UnitReport:
    """Report of a unit's work; nothing of it is stored. `started` is wall clock; `stage_seconds` are those of its stages:
    forward (the teacher's passes, with what is taken of them), encoding and writing."""

    unit: int
    documents: int
    rows: int
    positions: int
    bytes: int
    started: float
    stage_seconds: Mapping[str, float]
    batches_halved: int

    @property
    def teacher_seconds(self) -> float:
        """Seconds of the teacher's passes."""
        return self.stage_seconds.get("forward", 0.0)


def write_unit(
    plan: Plan, unit: int, tokenised: Tokenised, captured: list[Captured], *, documents: int, teacher: Teacher
) -> dict[str, Any]:
    """Write a unit's captured rows: files that are named by their content and, last, the record that names them, unless
    another process was first; returns it."""
    stored = [item for item in captured if item.columns is not None]
    quarantined = [*tokenised.quarantined, *_quarantined_rows(captured)]
    record: dict[str, Any] = {
        "documents": documents,
        **_audit(tokenised, stored, quarantined),
        "teacher": teacher.describe(),
        "fidelity": teacher.drift.result(),
        "read_by": plan.read_by(),
        "shard": None,
        "quarantine": None,
        "column_bytes": {},
        "job": plan.job,
    }
    if stored:
        shard, record["column_bytes"] = write_shard(
            plan.store,
            unit,
            rows=[item.row for item in stored],
            payload=[item.columns or {} for item in stored],
            groups=plan.groups(record["teacher"]["dtype"], targets=teacher.targets),
        )
        record["shard"] = shard.to_json()
    if quarantined:
        record["quarantine"] = vars(_write_quarantine(plan, unit, quarantined))
    with stage("writing"):
        put_record(plan.store, plan.records().name(unit), record)
    return record


def _audit(tokenised: Tokenised, stored: list[Captured], quarantined: list[Quarantined]) -> dict[str, int]:
    """Documents with at least one stored window are stored, the others are quarantined."""
    windows = [(segment.source_id, segment.occurrence) for item in stored for segment in item.row.segments]
    whole = set(windows)
    lost = [(item.source_id, item.occurrence) for item in quarantined]
    return {
        "quarantined_documents": len(set(lost) - whole),
        "windowed_documents": tokenised.windowed_documents,
        "extra_windows": len(windows) - len(whole),
        "windows_without_targets": tokenised.windows_without_targets,
        "windows_quarantined": sum(key in whole for key in lost),
    }


def _quarantined_rows(captured: list[Captured]) -> list[Quarantined]:
    """Every window of a row without targets goes into quarantine."""
    return [
        Quarantined(
            segment.source_id,
            segment.occurrence,
            item.problem,
            (segment.text or "")[:200],
            segment.byte_start,
            segment.byte_end,
        )
        for item in captured
        if item.problem is not None
        for segment in item.row.segments
    ]


def _write_quarantine(plan: Plan, unit: int, quarantined: list[Quarantined]) -> Any:
    said = ({key: value for key, value in vars(item).items() if value is not None} for item in quarantined)
    lines = "".join(json.dumps(item, sort_keys=True) + "\n" for item in said)
    return put_named(plan.store, QUARANTINE, f"part-{unit:05d}", ".jsonl", lines.encode())
