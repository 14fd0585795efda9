"""The job's real stages on some rows of a corpus, in this process: planned, read by the teacher, encoded, written, read back.

Nothing here imitates the job: planning, calibration, capture and writing are its own functions, in a folder that is gone
afterwards. Ray alone is missing.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from teachercache.cache import Cache
from teachercache.cache.reader import Split
from teachercache.cache.stores.local import LocalStore
from teachercache.config import Recipe
from teachercache.corpus.sample import CorpusSample
from teachercache.corpus.sequences import Tokenised
from teachercache.precompute.align.job import commit as commit_alignment
from teachercache.precompute.align.plan import make_plan as plan_alignment
from teachercache.precompute.align.units import align_shard
from teachercache.precompute.capture.commit import commit
from teachercache.precompute.capture.input_form import check_input
from teachercache.precompute.capture.plan import Plan, make_plan, unit_size
from teachercache.precompute.capture.units import actor_threads, calibrate, compute_unit
from teachercache.precompute.engine.placement import Node, Placement, actor_cpus, placed
from teachercache.precompute.estimate.choice import affordable_calibration, batches_of, chosen, padded_tokens, rows_of
from teachercache.precompute.estimate.counts import Counts, count
from teachercache.precompute.estimate.measured import Amount, Cost, Stopwatch
from teachercache.precompute.estimate.operations import forward_operations, tail_operations
from teachercache.precompute.estimate.sizes import SampleBytes, sizes_of, sizes_of_alignment
from teachercache.precompute.planning.counted import count_corpus
from teachercache.precompute.planning.shelf import Shelf
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.teacher import Teacher
from teachercache.tokens.rows import TokenRow

# Parts of the teacher's time.
ONLINE, CALIBRATION, CAPTURE = 0.15, 0.45, 0.4
CAPTURE_OVER_FORWARD = 1.3  # roughly: how many rows are chosen depends on it, no figure does
READ_POSITIONS = 4096  # of the sample's cache, at most
PROBED_ROWS = 2
# What the job's actors on CPUs are told by their environment (stages.py), as glibc's mallopt numbers it.
MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 2**26}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class TimedSample:
    """Measurements of it. `costs` are by stage: `capturing` of the rows in `captured`, `online` and `reading` of so many
    positions, `calibrating` of `fitted` positions, where the job fits `to_fit`."""

    counts: Counts
    placement: Placement
    costs: Mapping[str, Cost]
    captured: Amount
    online_positions: int
    read_positions: int
    fitted: int
    to_fit: int
    writing_seconds: float  # of capturing: what an actor's CPU does after its device
    sizes: tuple[SampleBytes, ...]  # of the cache, and of each alignment
    teacher: Mapping[str, Any]  # as `Teacher.describe` says
    device: str
    cores: int  # that this process may use
    operations: float  # of a position in a forward pass
    tail_operations: float  # of rebuilding its distribution


class SampleRun:
    """The stages, one after the other, with a stopwatch. Each needs those before it."""

    def __init__(self, recipe: Recipe, sample: CorpusSample, folder: Path, *, seconds: float, tell: Tell) -> None:
        self._recipe, self._small = recipe, _of_sample(recipe, sample, folder)
        self._folder, self._sample, self._seconds, self._tell = folder, sample, seconds, tell
        self._size = recipe.precompute.positions_per_batch
        self._watch = Stopwatch()

    def result(self) -> TimedSample:
        """Run all of it. Raises the job's own `UserError`s."""
        plan, counts = self._plan()
        placement = placement_here(self._recipe, units=counts.units)
        self._tell(f"about {counts.corpus.positions:,.0f} positions; loading the teacher …")
        with self._watch.of("loading"):
            teacher = _load(self._small, plan, placement)
        with_targets = [[row for row in part if row.positions] for part in counts.batched]
        batches = batches_of(with_targets, positions_per_batch=self._size)
        self._tell(f"running the teacher for about {self._seconds:g} seconds …")
        token_seconds = self._probe(teacher, rows_of(batches))
        plan, fitted, to_fit = self._calibrate(teacher, plan, counts, token_seconds)
        online = rows_of(chosen(batches, seconds=ONLINE * self._seconds, token_seconds=token_seconds))
        with self._watch.of("online"):
            teacher.label_nats(online, positions_per_batch=self._size)
        pace = CAPTURE_OVER_FORWARD * token_seconds
        rows = rows_of(chosen(batches, seconds=CAPTURE * self._seconds, token_seconds=pace))
        cache, writing_seconds = self._capture(teacher, plan, rows)
        with self._watch.of("reading"):
            read_positions = _read_back(cache)
        return TimedSample(
            counts=counts,
            placement=placement,
            captured=Amount.of(rows),
            online_positions=sum(row.positions for row in online),
            read_positions=read_positions,
            fitted=fitted,
            to_fit=to_fit,
            writing_seconds=writing_seconds,
            sizes=(sizes_of(cache), *(self._aligned(cache, student) for student in self._recipe.align)),
            costs=self._watch.costs,
            teacher=teacher.describe(),
            device=str(teacher.device),
            cores=len(os.sched_getaffinity(0)),
            operations=forward_operations(teacher, online[0], positions_per_batch=self._size),
            tail_operations=tail_operations(cache.targets),
        )

    def _plan(self) -> tuple[Plan, Counts]:
        corpus, again = self._small.corpus, self._folder / "again"
        assert corpus is not None
        with self._watch.of("planning"):
            plan = make_plan(self._small)
        with self._watch.of("counting"):  # once more, alone: it is what planning takes longer for on a larger corpus
            size, positions = unit_size(self._small.precompute, plan.targets), plan.targets.calibration_positions
            count_corpus(corpus, size, Shelf(LocalStore(again), "corpus"), calibration_positions=positions)
        with self._watch.of("tokenising"):
            return plan, count(self._recipe, plan, self._sample)

    def _probe(self, teacher: Teacher, rows: Sequence[TokenRow]) -> float:
        """Seconds a token of rows of middling length, roughly; the first pass warms up."""
        middle = [*rows[len(rows) // 2 :][:PROBED_ROWS]]
        teacher.label_nats(middle[:1], positions_per_batch=self._size)
        with self._watch.of("probing"):
            teacher.label_nats(middle, positions_per_batch=self._size)
        return self._watch.costs["probing"].seconds / padded_tokens([middle])

    def _calibrate(self, teacher: Teacher, plan: Plan, counts: Counts, token_seconds: float) -> tuple[Plan, int, int]:
        """The plan, with fewer positions to fit where all take too long; positions that were fitted, and that the job fits."""
        wanted = plan.targets.calibration_positions
        positions = affordable_calibration(plan.targets, int(CALIBRATION * self._seconds / token_seconds))
        if positions < wanted:
            plan = make_plan(_with_calibration(self._small, positions))
            teacher.targets = plan.loaded_targets()
        with self._watch.of("checking input"):
            check_input(teacher, plan, positions_per_batch=self._size)
        if plan.calibration() is not None:
            return plan, 0, 0
        with self._watch.of("calibrating"):
            calibrate(teacher, plan, sequence=self._recipe.sequence, positions_per_batch=self._size)
        fitted = int((plan.calibration() or {})["positions"])
        return plan, fitted, max(fitted, min(wanted, int(counts.corpus.positions) // 2))

    def _capture(self, teacher: Teacher, plan: Plan, rows: list[TokenRow]) -> tuple[Cache, float]:
        """A cache of these rows, in one shard, and the seconds that writing it took."""
        documents = len({(segment.source_id, segment.occurrence) for row in rows for segment in row.segments})
        with self._watch.of("capturing"):
            report = compute_unit(
                teacher, plan, 0, Tokenised(rows=rows), documents=documents, positions_per_batch=self._size
            )
        writing_seconds = self._watch.costs["capturing"].seconds - report.teacher_seconds
        with self._watch.of("committing"):
            commit(replace(plan, units=1, rows_in=documents, deduplicated=0))
        return Cache.open(plan.store.name), writing_seconds

    def _aligned(self, cache: Cache, student: str) -> SampleBytes:
        with self._watch.of("planning alignments"):
            plan = plan_alignment(cache, student)
        with self._watch.of("aligning"):
            align_shard(plan, 0)
        commit_alignment(plan, cache)
        return sizes_of_alignment(cache.folder / plan.within, student=student)


def _of_sample(recipe: Recipe, sample: CorpusSample, folder: Path) -> Recipe:
    """The recipe, over the sampled rows."""
    assert recipe.corpus is not None
    field = recipe.corpus.messages_field or recipe.corpus.text_field
    file = folder / "corpus.jsonl"
    with file.open("w", encoding="ascii") as lines:
        for block in sample.blocks:
            lines.writelines(_line(row, field) for row in block.rows)
    here = {"source": str(file), "format": "jsonl", "name": None, "split": "train", "streaming": False, "limit": None}
    return recipe.model_copy(
        update={"cache": folder / "cache", "align": (), "corpus": recipe.corpus.model_copy(update=here)}
    )


def _line(row: dict[str, Any], field: str) -> str:
    """A row, as far as the job looks at it; one that cannot be read stays one that cannot be."""
    kept = None if "_unreadable" in row else {name: value for name, value in row.items() if name == field}
    return json.dumps(kept, default=str) + "\n"


def placement_here(recipe: Recipe, *, units: int) -> Placement:
    """The placement of the teacher in a cluster of this machine alone."""
    settings = recipe.precompute
    asked = 1 if settings.actors == "auto" else settings.actors
    cpus = max(os.cpu_count() or 1, asked * actor_cpus(settings)) + 1
    return placed(settings, [Node(cpus, torch.cuda.device_count())], units=units)


def _load(recipe: Recipe, plan: Plan, placement: Placement) -> Teacher:
    """As an actor loads it, with its threads."""
    assert recipe.teacher is not None
    torch.set_num_threads(actor_threads(recipe.precompute))
    if not placement.gpus:
        _keep_freed_memory()
    return Teacher.load(
        recipe.teacher,
        targets=plan.loaded_targets(),
        layout=recipe.sequence.layout,
        pad_id=plan.identity["tokenizer"]["pad_id"],
        longest=recipe.sequence.length,
        device="cuda" if placement.gpus else "cpu",
    )


def _keep_freed_memory() -> None:
    """Allocate as actors on CPUs do; nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)


def _with_calibration(recipe: Recipe, positions: int) -> Recipe:
    """The recipe with a smaller sample for calibration."""
    sections = {name: getattr(recipe.targets, name) for name in type(recipe.targets).model_fields}
    fewer = {
        name: section.model_copy(update={"calibration_positions": positions})
        for name, section in sections.items()
        if getattr(section, "calibration_positions", 0) > positions
    }
    return recipe.model_copy(update={"targets": recipe.targets.model_copy(update=fewer)})


def _read_back(cache: Cache) -> int:
    """Read rows as training does, and rebuild the teacher's distributions; returns of how many positions."""
    policy = cache.kind.tail_policies[0]
    layers = [column.name for kind in cache.targets.layers for column in kind.columns]
    rows = OwnRows(cache, (*cache.kind.objective_columns(policy), *layers))
    collate, positions = Collator.of(rows), 0
    splits: tuple[Split, ...] = ("train", "held-out")
    for split in splits:
        for index in range(cache.rows_of(split)):
            if positions > READ_POSITIONS:
                return positions
            batch = collate([rows.read(split, index)])
            softened = cache.kind.softened(batch["targets"], 1.0, tail=policy, xp=torch)
            if softened.tail is not None:
                softened.tail.logits(slice(0, len(softened)), torch)
            positions += len(softened)
    return positions
