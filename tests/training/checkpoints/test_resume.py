"""Kill a run and run it again: the same losses, bit by bit, as if nobody had killed it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from teachercache.cache import Cache
from teachercache.config import Recipe
from teachercache.errors import JobFailed, RecipeError
from teachercache.training.checkpoints.completion import complete_checkpoints
from teachercache.training.job.train import run_training
from training.runs import JOB, kill_after, log_of, start_job

from builders import tiny_model


def test_a_killed_run_goes_on_as_if_nothing_had_happened(make_recipe: Any, tmp_path: Path) -> None:
    settings = {"epochs": 5, "save_every": 3, "log_every": 2, "trackers": []}
    uninterrupted = make_recipe(output=tmp_path / "whole", **settings)
    killed = make_recipe(output=tmp_path / "killed", loader_workers=1, **settings)
    run_training(uninterrupted)
    kill_after(start_job(killed, tmp_path), killed.train.output, 6)
    newest = complete_checkpoints(killed.train.output)[-1].step
    result = run_training(killed)
    assert 6 <= newest < 30 and result["resumed_from"] == newest
    assert log_of(killed.train.output) == log_of(uninterrupted.train.output)
    assert _weights(killed) == _weights(uninterrupted)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_ends_a_run_with_a_checkpoint_and_a_line(make_recipe: Any, tmp_path: Path, processes: int) -> None:
    settings = {"epochs": 5, "save_every": 100, "evaluate_every": 100, "trackers": []}
    whole, stopped = (make_recipe(output=tmp_path / name, **settings) for name in ("whole", "stopped"))
    assert start_job(whole, tmp_path, processes=processes).wait() == 0
    process, log = start_job(stopped, tmp_path, processes=processes), stopped.train.output / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    newest = complete_checkpoints(stopped.train.output)[-1].step
    assert process.returncode != 0 and 3 <= newest < 30
    assert f"stopped by SIGTERM after step {newest} of 30; its checkpoint is whole" in errors
    assert start_job(stopped, tmp_path, processes=processes).wait() == 0
    assert log_of(stopped.train.output) == log_of(whole.train.output)
    assert _weights(stopped) == _weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_processes_go_on_together(make_recipe: Any, tmp_path: Path, stage: int) -> None:
    settings = {"epochs": 5, "save_every": 3, "zero_stage": stage}
    whole = make_recipe(output=tmp_path / "whole", **settings)
    killed = make_recipe(output=tmp_path / "killed", **settings)
    assert start_job(whole, tmp_path, processes=2).wait() == 0
    for step in (6, 18):
        kill_after(start_job(killed, tmp_path, processes=2), killed.train.output, step)
    assert start_job(killed, tmp_path, processes=2).wait() == 0
    assert log_of(killed.train.output) == log_of(whole.train.output)
    assert _weights(killed) == _weights(whole)


def test_a_half_written_checkpoint_is_not_resumed_from(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(zero_stage=2)
    run = recipe.train.output
    run_training(recipe)
    before, weights = log_of(run), _weights(recipe)
    _unfinish(run)
    half = run / "checkpoint-9"
    (half / "complete.json").unlink()
    (half / "model.safetensors").write_bytes(b"half")
    (run / "checkpoint-99").mkdir()  # killed before anything but the folder was there
    assert run_training(recipe)["resumed_from"] == 8
    assert not (run / "checkpoint-99").exists()
    assert log_of(run) == before and _weights(recipe) == weights


def test_a_run_killed_before_its_export_only_exports(make_recipe: Any) -> None:
    recipe = make_recipe()
    first = run_training(recipe)
    weights, checkpoints = _weights(recipe), _modified(recipe)
    _unfinish(recipe.train.output)
    again = run_training(recipe)
    assert again["resumed_from"] == again["steps"] == 9 and again["best"] == first["best"]
    assert _weights(recipe) == weights and _modified(recipe) == checkpoints


def test_intervals_may_change_between_runs(make_recipe: Any) -> None:
    recipe = make_recipe()
    run_training(recipe)
    _unfinish(recipe.train.output)
    shutil.rmtree(recipe.train.output / "checkpoint-9")
    run_training(make_recipe(log_every=7, micro_batch=4, evaluate_every=9))
    assert [record["step"] for record in log_of(recipe.train.output)][-2:] == [9, 9]


def test_other_settings_do_not_go_on_with_a_run(make_recipe: Any) -> None:
    run_training(make_recipe(max_steps=2))
    with pytest.raises(RecipeError, match=r"train.learning_rate was 0.01, now 0.5.*use another train.output"):
        run_training(make_recipe(max_steps=2, learning_rate=0.5))
    with pytest.raises(RecipeError, match=r"objective.alpha was 0.7, now 0.2"):
        run_training(make_recipe(max_steps=2, objective={"alpha": 0.2}))


def test_another_student_in_the_same_folder_does_not_go_on_with_a_run(
    make_recipe: Any, student: Path, tmp_path: Path
) -> None:
    """As after `init-student --overwrite`, for a finished run and for an unfinished one."""
    path = tmp_path / "student"
    shutil.copytree(student, path)
    recipe = make_recipe(student_model=path, max_steps=2)
    run_training(recipe)
    tiny_model(layers=2, seed=1).save_pretrained(path)
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"student.weights_sha256 was .*, now .*use another train.output"):
            run_training(recipe)
        (recipe.train.output / "summary.json").unlink(missing_ok=True)


def test_checkpoints_of_somebody_else_are_left_alone(make_recipe: Any) -> None:
    recipe = make_recipe()
    (recipe.train.output / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"has no run.json"):
        run_training(recipe)
    assert (recipe.train.output / "checkpoint-5").is_dir()


def test_two_jobs_do_not_write_to_one_folder(make_recipe: Any) -> None:
    recipe = make_recipe(max_steps=2)
    program = (
        "import sys; from pathlib import Path; from teachercache.training.job.run_folder import RunFolder\n"
        f"with RunFolder(Path({str(recipe.train.output)!r})).locked(): print('locked', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(JOB.parents[1] / "pipeline")}
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(JobFailed, match="another training job"):
        run_training(recipe)
    holder.kill()
    holder.communicate()
    assert run_training(recipe)["steps"] == 2


def _unfinish(run: Path) -> None:
    (run / "summary.json").unlink()
    shutil.rmtree(run / "student")


def _weights(recipe: Recipe) -> bytes:
    assert recipe.train is not None
    return (recipe.train.output / "student" / "model.safetensors").read_bytes()


def _modified(recipe: Recipe) -> dict[str, int]:
    assert recipe.train is not None
    return {str(path): path.stat().st_mtime_ns for path in recipe.train.output.glob("checkpoint-*/*")}


def test_the_summary_on_disk_is_the_result(make_recipe: Any) -> None:
    recipe = make_recipe(max_steps=2)
    result = run_training(recipe)
    assert json.loads((recipe.train.output / "summary.json").read_text()) == result
    assert set(result) == {
        "steps", "rows", "positions", "losses", "positions_per_second", "waiting_for_data", "student", "best",
        "zero_stage", "seconds", "resumed_from",
    }  # fmt: skip


def test_the_last_line_says_what_was_trained(make_recipe: Any, cache: Path) -> None:
    recipe, console = make_recipe(epochs=2, log_every=5, global_batch=10), Console(file=io.StringIO())
    result = run_training(recipe, console=console)
    opened = Cache.open(cache)
    assert result["rows"] == 2 * opened.rows_of("train")
    assert result["positions"] == 2 * opened.positions_of("train")
    last = console.file.getvalue().splitlines()[-1]
    best, student = result["best"], recipe.train.output / "student"
    assert last.startswith(f"trained {result['steps']} steps: {result['rows']} rows, {result['positions']:,} positions")
    assert last.endswith(f"best held-out loss {best['loss']:.4f} at step {best['step']}; student → {student}")
