"""Rows on which the teacher raises, hangs or dies: they go to quarantine, and everything else into the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teachercache.cache import Cache, verify
from teachercache.config import Recipe
from teachercache.corpus.documents import content_id
from teachercache.precompute.capture.attempts import Attempts
from teachercache.precompute.capture.job_facts import Job
from teachercache.precompute.capture.plan import make_plan
from teachercache.precompute.capture.supervisor import Supervisor
from teachercache.precompute.engine.placement import Placement

from builders import sentences, tiny_recipe
from failing_teacher import EXITS, HANGS, POISONS, RAISES, failing_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return failing_teacher(tmp_path_factory.mktemp("teacher") / "failing")


def recipe_with(folder: Path, teacher: Path, texts: list[str], **sections: Any) -> Recipe:
    """Rows of about 30 tokens, six in a batch, 16 in a unit."""
    precompute = {"batch_seconds": 2.0, "actors": 1, **sections.pop("precompute", {})}
    recipe = tiny_recipe(
        folder,
        teacher=teacher,
        texts=texts,
        sequence={"length": 200},
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


def test_what_is_found_is_there_for_the_next_run(tmp_path, teacher):
    """The supervisor is gone after its first failure; the next one begins with the rows that were being read, and one after
    that does not read the row that fails at all."""
    recipe = recipe_with(tmp_path, teacher, [*sentences(8), f"one {EXITS} ends"])
    supervisor, plan = supervised(recipe)
    attempts = Attempts.of(plan.store, 0, run="killed before")
    attempts.begun = 1
    attempts.write()
    asked = 0

    class Killed(Exception):
        pass

    def killed(*rows: Any) -> Exception:
        nonlocal asked
        asked += 1
        raise Killed

    supervisor._failure_of = killed
    tokens = supervisor._tokenised(0, attempts)
    with pytest.raises(Killed):
        supervisor.compute(0, tokens)
    supervisor._end()
    assert asked == 1
    suspects = json.loads(plan.store.get(".work/attempts/00000.json"))["suspects"]
    assert 0 < len(suspects) < 9
    supervisor, again = supervised(recipe)
    assert again.pending() == [0]
    report = supervisor.compute(0, tokens)
    supervisor._end()
    assert report.positions > 0
    lost = json.loads(plan.store.get(".work/attempts/00000.json"))["lost"]
    assert len(lost) == 1 and set(lost) <= set(suspects)
