"""Rows on which the teacher raises, hangs or dies: they go to quarantine, and everything else into the cache."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from teachercache.cache import Cache, verify
from teachercache.config import Recipe
from teachercache.corpus.documents import content_id
from teachercache.errors import JobFailed
from teachercache.precompute.capture.attempts import Attempts
from teachercache.precompute.capture.commit import commit
from teachercache.precompute.capture.job_facts import Job
from teachercache.precompute.capture.plan import make_plan
from teachercache.precompute.capture.supervisor import GivenUp, Supervisor
from teachercache.precompute.capture.units import calibration_rows
from teachercache.precompute.engine.placement import Placement

from builders import sentences, tiny_recipe
from failing_teacher import EXITS, HANGS, POISONS, RAISES, failing_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return failing_teacher(tmp_path_factory.mktemp("teacher") / "failing")


ROOT = Path(__file__).parents[3]
SKETCH = {"logits": {"kind": "head+sketch", "k": 4, "rank": 4, "step": 0.1, "calibration_positions": 400}}
PATIENCE = 300  # seconds, on a machine that has other things to do


def recipe_with(folder: Path, teacher: Path, texts: list[str], **sections: Any) -> Recipe:
    """Rows of about 30 tokens, six in a batch, 16 in a unit."""
    precompute = {"batch_seconds": 2.0, "actors": 1, **sections.pop("precompute", {})}
    recipe = tiny_recipe(
        folder,
        teacher=teacher,
        texts=texts,
        sequence={"length": 200, **sections.pop("sequence", {})},
        precompute=precompute,
        corpus={"held_out": 0},
        **sections,
    )
    trusting = recipe.teacher.model_copy(update={"trust_remote_code": True})
    return recipe.model_copy(update={"teacher": trusting})


def supervised(recipe: Recipe) -> tuple[Supervisor, Any]:
    plan = make_plan(recipe)
    return Supervisor(Job.of(recipe, plan, Placement(1, 0.0, 1.0, 1))), plan


def quarantined(cache: Path) -> dict[str, str]:
    lines = [line for path in (cache / "quarantine").iterdir() for line in path.read_text().splitlines()]
    return {entry["source_id"]: entry["reason"] for entry in map(json.loads, lines)}


def stored(cache: Path) -> set[str]:
    opened = Cache.open(cache)
    rows = [opened.read_row("train", index).row for index in range(opened.rows_of("train"))]
    return {segment.source_id for row in rows for segment in row.segments}


def test_rows_that_end_and_raise_are_found_among_all_rows_of_a_pass(tmp_path, teacher):
    """In one unit; only the first is the end of a process."""
    good = sentences(12)
    bad = {
        f"this one {EXITS} ends": "crashed: exit status 3; this token ends its process",
        f"that one {RAISES} raises": "raised: ValueError: this token is not liked",
    }
    supervisor, plan = supervised(recipe_with(tmp_path, teacher, [*good[:4], *bad, *good[4:]]))
    reports = [supervisor.compute(unit, b"") for unit in plan.pending()]
    assert all(report.positions > 0 for report in reports)
    commit(plan)
    assert quarantined(tmp_path / "cache") == {content_id(text): reason for text, reason in bad.items()}
    assert stored(tmp_path / "cache") == {content_id(text) for text in good}


def test_packed_rows_that_fail_take_their_documents_along_and_nothing_else(tmp_path, teacher):
    texts = [*sentences(12), f"that one {RAISES} raises"]
    packed = {"layout": "packed", "length": 100}
    supervisor, plan = supervised(recipe_with(tmp_path, teacher, texts, sequence=packed))
    for unit in plan.pending():
        supervisor.compute(unit, b"")
    audit = commit(plan).audit
    lost = quarantined(tmp_path / "cache")
    assert content_id(texts[-1]) in lost and all("not liked" in reason for reason in lost.values())
    assert (audit.rows_in, audit.stored) == (13, len(stored(tmp_path / "cache"))) and audit.stored >= 8
    assert verify(tmp_path / "cache") == []


def test_calibration_leaves_out_rows_that_fail(tmp_path, teacher):
    bad = [f"number {number} {RAISES} raises" for number in range(4)]
    recipe = recipe_with(tmp_path, teacher, [*sentences(8), *bad], targets=SKETCH)
    supervisor, plan = supervised(recipe)
    drawn = {row.row_id: row for row in calibration_rows(plan, sequence=recipe.sequence)}
    failing = {content_id(text) for text in bad}
    blamed = {name for name, row in drawn.items() if {segment.source_id for segment in row.segments} & failing}
    assert blamed, "none of them is in the sample"
    supervisor.calibrate()
    assert set(plan.calibration()["rows"]) == set(drawn) - blamed
    for unit in plan.pending():
        supervisor.compute(unit, b"")
    assert commit(plan).audit.quarantined == len(bad)


def test_a_unit_that_fails_without_a_row_to_blame_is_given_up_and_others_go_on(tmp_path):
    """Memory fills up over many rows: no row fails alone."""
    leaking = failing_teacher(tmp_path / "leaking", most_rows=40)
    recipe = recipe_with(tmp_path, leaking, sentences(70), precompute={"unit_rows": 60})
    supervisor, plan = supervised(recipe)
    first, second = (supervisor.compute(unit, b"") for unit in plan.pending())
    assert first == GivenUp(0, "crashed: exit status 4; memory is full") and second.positions > 0
    assert plan.pending() == [0]
    with pytest.raises(JobFailed, match="1 of 2 units have no result"):
        commit(plan)


SUPERVISED = """
import pickle, sys
job = pickle.load(open(sys.argv[1], "rb"))
from teachercache.precompute.capture.supervisor import Supervisor
Supervisor(job).compute(0, b"")
"""


def test_a_job_that_is_killed_while_it_looks_for_a_row_goes_on_looking(tmp_path, teacher):
    """SIGKILL of whoever supervises, in the middle of the search: the next one begins with the rows that were being read."""
    recipe = recipe_with(tmp_path, teacher, [*sentences(8), f"one {HANGS} hangs"])
    plan = make_plan(recipe)
    job = Job.of(recipe, plan, Placement(1, 0.0, 1.0, 1))
    attempts = Attempts.of(plan.store, 0, run="killed before")
    attempts.begun = 1
    attempts.write()
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline")}
    command = [sys.executable, "-c", SUPERVISED, str(tmp_path / "job.pickle")]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    until, suspects = time.monotonic() + PATIENCE, list[str]()
    while not 0 < len(suspects) < 4 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
        suspects = json.loads(plan.store.get(attempts.file))["suspects"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(suspects) < 4
    assert json.loads(plan.store.get(attempts.file))["lost"] == {}, "killed too late to show anything"
    supervisor, again = supervised(recipe)
    assert again.pending() == [0]
    assert supervisor.compute(0, b"").positions > 0
    [reason] = json.loads(again.store.get(attempts.file))["lost"].values()
    assert reason.startswith("hung: ")


@pytest.mark.slow
def test_rows_that_end_raise_hang_and_poison_are_quarantined_and_all_others_stored(tmp_path, teacher):
    """One job on Ray has all four, in units of their own and together."""
    from rich.console import Console

    from teachercache.precompute.capture.job import run_precompute

    good = sentences(36)
    hanging = " ".join(["the cat"] * 60) + HANGS  # so long that it is a batch of its own
    bad = {
        f"this one {EXITS} ends": ("crashed: exit status 3", "this token ends its process"),
        f"that one {RAISES} raises": ("raised: ValueError: this token is not liked", ""),
        hanging: ("hung: a batch did not end within 2 s; SIGABRT", "failing.py"),  # where it hung
        f"another one {POISONS} poisons": ("raised: RuntimeError: device-side assert triggered", ""),
    }
    texts = [*good[:8], *list(bad)[:3], *good[8:30], list(bad)[3], *good[30:]]
    recipe = recipe_with(tmp_path, teacher, texts)
    summary = run_precompute(recipe, console=Console(quiet=True))
    assert (summary["rows"], summary["quarantined"]) == (36, 4)
    reasons = quarantined(tmp_path / "cache")
    for text, (begins, holds) in bad.items():
        assert reasons[content_id(text)].startswith(begins) and holds in reasons[content_id(text)]
    assert stored(tmp_path / "cache") == {content_id(text) for text in good}
    assert verify(tmp_path / "cache") == []
