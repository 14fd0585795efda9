"""A job whose processes are killed at any moment: the same command goes on; nothing is lost in the end, and nothing twice."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from teachercache.cache import verify
from teachercache.config import Recipe
from teachercache.precompute.capture.stages import RESTARTS

from builders import build_cache, sentences, tiny_recipe
from failing_teacher import failing_teacher
from running_job import RunningJob

KILLS = 20
KINDS = ("driver", "actor", "teacher", "raylet")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """One that takes its time, so that something can be killed meanwhile."""
    return failing_teacher(tmp_path_factory.mktemp("teacher") / "slow", seconds=0.05)


def recipe_of(folder: Path, teacher: Path, *, rows: int) -> Recipe:
    """Four rows a unit, one or two in a forward pass."""
    precompute: dict[str, Any] = {"unit_rows": 4, "positions_per_batch": 64, "actors": 1}
    recipe = tiny_recipe(folder, teacher=teacher, texts=sentences(rows, seed=4), precompute=precompute)
    trusting = recipe.teacher.model_copy(update={"trust_remote_code": True})
    return recipe.model_copy(update={"teacher": trusting})


def contents(cache: Path) -> dict[str, bytes]:
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def assert_undisturbed(cache: Path, alone: Recipe) -> None:
    """Every byte is what a job writes that nobody disturbs."""
    assert verify(cache) == []
    assert contents(cache) == contents(build_cache(alone))


def test_a_job_goes_on_after_deaths_of_the_teacher_the_actor_and_the_node(tmp_path, teacher):
    """The first two are mended while it runs; SIGTERM, and the death of Ray's node, end it in one line."""
    recipe = recipe_of(tmp_path / "killed", teacher, rows=80)
    with RunningJob(recipe) as job:
        assert job.wait_for(lambda: len(job.records()) >= 1)
        assert job.send("teacher")
        assert job.wait_for(lambda: len(job.records()) >= 3)
        assert job.send("actor")
        assert job.wait_for(lambda: len(job.records()) >= 6)
        assert job.send("driver", signal.SIGTERM)
        status, out, _ = job.end()
        told = json.loads(out)
        assert (status, told["exit_status"]) == (1, 1)
        assert told["error"].startswith("stopped by SIGTERM; finished units are kept")
        kept = job.records()
    with RunningJob(recipe) as job:
        assert job.wait_for_more(kept)
        assert job.send("raylet")
        status, out, _ = job.end()
        assert status == 1
        assert "the Ray node that it had started was killed" in json.loads(out)["error"]
    with RunningJob(recipe) as job:
        status, out, err = job.end()
        assert status == 0, err
        assert "resuming: " in err
    assert_undisturbed(recipe.cache, recipe_of(tmp_path / "alone", teacher, rows=80))


@pytest.mark.slow
def test_twenty_kills_in_a_row_lose_nothing_and_do_nothing_twice(tmp_path, teacher):
    """Driver, actor, teacher's process and raylet are killed at random moments, each followed by the same command where that
    ended the job; new records are waited for, so that there is something to lose."""
    recipe, generator = recipe_of(tmp_path / "killed", teacher, rows=480), random.Random(0)
    left = [KINDS[number % len(KINDS)] for number in range(KILLS)]
    generator.shuffle(left)
    kept: set[str] = set()
    while left:
        with RunningJob(recipe) as job:
            while left and job.wait_for_more(kept):
                kept = job.records()
                time.sleep(generator.uniform(0, 1))
                kind = left[-1]
                if job.send(kind):
                    left.pop()
                if kind in ("driver", "raylet"):
                    break
            if left:
                status, _, err = job.end()
                assert status in (1, -signal.SIGKILL), err
        assert job.records() >= kept
        kept = job.records()
    assert not (recipe.cache / "manifest.json").exists(), "killed too late to show anything"
    with RunningJob(recipe) as job:
        status, _, err = job.end()
        assert status == 0, err
    assert_undisturbed(recipe.cache, recipe_of(tmp_path / "alone", teacher, rows=480))


@pytest.mark.slow
def test_an_actor_that_dies_again_and_again_ends_the_job(tmp_path, teacher):
    """It is killed as soon as it is there: Ray starts it again, and not for ever."""
    recipe = recipe_of(tmp_path, teacher, rows=80)
    with RunningJob(recipe) as job:
        while job.is_running() and job.send("actor"):
            pass
        status, out, err = job.end()
    assert status == 1, err
    assert json.loads(out)["error"].startswith(f"the job stopped: an actor died {RESTARTS + 1} times")
