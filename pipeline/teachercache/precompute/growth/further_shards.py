"""The further targets of one shard: its rows through the teacher once more, from their stored tokens. No Ray, no order."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from teachercache.cache import Cache, write_shard
from teachercache.errors import JobFailed
from teachercache.precompute.capture.units import put_made
from teachercache.precompute.engine.records import put_record
from teachercache.precompute.growth.further_targets import LAYERS, FurtherTargets
from teachercache.precompute.planning.sample import salted_hash
from teachercache.teacher import Teacher
from teachercache.tokens.rows import TokenRow

SAMPLED_SHARDS = 64  # that the sample is drawn from


@dataclass(frozen=True)
class FurtherReport:
    """Report of a shard's work; nothing of it is stored. `started` is wall clock."""

    positions: int
    started: float


def make_layer_files(teacher: Teacher, plan: FurtherTargets, *, positions_per_batch: int) -> None:
    """Make what the further targets are read by, from a sample of the rows for training, and write the record of it."""
    rows = sample_rows(plan)
    layers = teacher.prepare(rows, positions_per_batch=positions_per_batch, longest=plan.longest)
    record = {
        "read_by": {section: {"layers": put_made(plan.store, file)} for section, file in layers.items()},
        "positions": sum(row.positions for row in rows),
        "rows": sorted(row.row_id for row in rows),
        "sources": sorted({segment.source_id for row in rows for segment in row.segments}),
    }
    plan.store.put(LAYERS, json.dumps(record, sort_keys=True).encode())


def sample_rows(plan: FurtherTargets) -> list[TokenRow]:
    """Rows for training by the hash of their ids, of shards spread over the cache: as many as the targets want, and at most
    half of those that were looked at."""
    cache = _opened(plan.store.name, plan.cache)
    rows: list[TokenRow] = []
    chosen = np.unique(np.linspace(0, plan.units - 1, min(plan.units, SAMPLED_SHARDS)).astype(int))
    for number in chosen.tolist():
        info = cache.infos[number]
        rows += [_row(cache, number, index) for index in range(info.rows - info.held_out_rows)]
    rows = sorted((row for row in rows if row.positions), key=lambda row: salted_hash(row.row_id))
    if not rows:
        raise JobFailed(f"{plan.store.name} has no row to train on, from which the layers' steps could be taken")
    wanted = min(plan.targets.calibration_positions, sum(row.positions for row in rows) // 2)
    taken = np.cumsum([row.positions for row in rows])
    return rows[: int(np.searchsorted(taken, wanted)) + 1]


def capture_shard(teacher: Teacher, plan: FurtherTargets, unit: int, *, positions_per_batch: int) -> FurtherReport:
    """Write the further targets of a shard's rows and, last, its record.

    Raises `JobFailed`, which names the row, where the teacher gives no numbers for one: it cannot be left out here.
    """
    started, cache = time.time(), _opened(plan.store.name, plan.cache)
    info = cache.infos[unit]
    rows = [_row(cache, unit, index) for index in range(info.rows)]
    captured = teacher.capture_layers(rows, positions_per_batch=positions_per_batch)
    for item in captured:
        if item.columns is None:
            raise JobFailed(
                f"row {item.row.row_id} of {plan.store.name}: {item.problem}; take it out first (`teachercache filter "
                f"{plan.store.name} --where \"row_id != '{item.row.row_id}'\" --to …`)"
            )
    shard, column_bytes = write_shard(
        plan.store, unit, rows=rows, payload=[item.columns or {} for item in captured], groups=plan.groups()
    )
    put_record(plan.store, plan.record_name(unit), {"shard": shard.to_json(), "column_bytes": column_bytes})
    return FurtherReport(sum(row.positions for row in rows), started)


def _row(cache: Cache, number: int, index: int) -> TokenRow:
    return cache.shard(number).read_row(index, (), cache.recent).row


@lru_cache(maxsize=1)
def _opened(folder: str, fingerprint: str) -> Cache:
    return Cache.open(folder, as_of=fingerprint)
