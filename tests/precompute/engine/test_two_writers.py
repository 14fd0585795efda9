"""Two processes that write one unit, as after a lost node whose work was given to another one: every file that is published is
what its record says."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from teachercache.cache import verify
from teachercache.corpus.sequences import Quarantined
from teachercache.precompute.capture import unit_tokens, units
from teachercache.precompute.capture.commit import commit
from teachercache.precompute.capture.plan import Plan, make_plan
from teachercache.teacher import Captured, Teacher

from builders import tiny_recipe, tiny_teacher


def write(plan: Plan, written: dict[str, Any], seed: int, races: int, start: Barrier, wrong: SimpleQueue[str]) -> None:
    """One of the writers; their targets differ in the last bit, as those of two GPUs do."""
    for race in range(races):
        start.wait()
        captured = [
            Captured(item.row, {**item.columns, "head_logits": item.columns["head_logits"] - (seed + race % 7)})
            for item in written["captured"]
        ]
        try:
            units.write_unit(plan, 0, **{**written, "captured": captured})
        except Exception as error:
            wrong.put(f"{type(error).__name__}: {error}")
        start.wait()
        start.wait()  # until the result is looked at


def mismatches(plan: Plan) -> list[str]:
    """Files of the unit's record that hold something else than it says."""
    record = json.loads(plan.store.get(plan.records().name(0)))
    files = [*record["shard"]["files"].values(), record["quarantine"]]
    return [
        info["file"] for info in files if hashlib.sha256(plan.store.get(info["file"])).hexdigest() != info["sha256"]
    ]


@pytest.mark.parametrize("races", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_record_names_what_its_writer_published(tmp_path: Path, races: int) -> None:
    recipe = tiny_recipe(
        tmp_path, teacher=tiny_teacher(tmp_path / "teacher", layers=1), precompute={"unit_rows": 10**6}
    )
    plan = make_plan(recipe)
    tokenised, documents = unit_tokens.tokenise_unit(plan, 0, sequence=recipe.sequence, store_text=True)
    tokenised.quarantined.append(Quarantined("0" * 32, 0, "a line of its own", ""))
    teacher = Teacher.load(recipe.teacher, targets=plan.targets, layout="documents", pad_id=0)
    captured = teacher.capture(tokenised.rows, positions_per_batch=2048)
    written = {"tokenised": tokenised, "captured": captured, "documents": documents + 1, "teacher": teacher}
    context = multiprocessing.get_context("fork")
    start, wrong = context.Barrier(3), context.SimpleQueue()
    writers = [context.Process(target=write, args=(plan, written, seed, races, start, wrong)) for seed in (0, 100)]
    for writer in writers:
        writer.start()
    found, winners = list[str](), set[bytes]()
    for _ in range(races):
        start.wait()
        start.wait()
        found += mismatches(plan)
        winners.add(plan.store.get(plan.records().name(0)))
        plan.store.delete(plan.records().name(0))
        start.wait()
    for writer in writers:
        writer.join()
    assert wrong.empty(), wrong.get()
    assert not found and len(winners) > 1


def test_what_the_second_writer_made_is_collected(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, teacher=tiny_teacher(tmp_path / "teacher", layers=1))
    plan = make_plan(recipe)
    teacher = Teacher.load(recipe.teacher, targets=plan.targets, layout="documents", pad_id=0)
    for unit in range(plan.units):
        tokenised, documents = unit_tokens.tokenise_unit(plan, unit, sequence=recipe.sequence, store_text=True)
        captured = teacher.capture(tokenised.rows, positions_per_batch=256)
        later = [
            Captured(item.row, {**item.columns, "head_logits": item.columns["head_logits"] - 1}) for item in captured
        ]
        for written in (captured, later):
            units.write_unit(plan, unit, tokenised, written, documents=documents, teacher=teacher)
    assert len(plan.store.list("shards/")) == 2 * plan.units
    manifest = commit(plan)
    assert len(plan.store.list("shards/")) == plan.units == len(manifest.shards)
    assert verify(recipe.cache) == []
