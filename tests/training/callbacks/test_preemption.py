"""SIGTERM as schedulers and launchers send it: to every process of a job, loaders' workers too, and more than once."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from teachercache.training.checkpoints.completion import complete_checkpoints
from training.runs import start_job

TIMEOUT_SECONDS = 600


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def _signal_all(family: list[psutil.Process]) -> None:
    for member in family:
        if member.is_running():
            member.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "processes",
    [1, pytest.param(2, marks=pytest.mark.slow)],
    ids=["alone", "torchrun"],
)
def test_sigterm_to_every_process_ends_a_run_with_a_checkpoint(
    make_recipe: Any, tmp_path: Path, processes: int
) -> None:
    settings = {"epochs": 20, "save_every": 1000, "evaluate_every": 1000, "loader_workers": 2}
    recipe = make_recipe(output=tmp_path / "stopped", **settings)
    process, log = (
        start_job(recipe, tmp_path, processes=processes, json_document=False),
        recipe.train.output / "log.jsonl",
    )
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.002)
    family = _family(process)
    assert len(family) > 2  # the loader's workers are among them
    for _ in range(2):
        _signal_all(family)
    errors = process.communicate(timeout=TIMEOUT_SECONDS)[1]
    assert process.returncode != 0
    assert "its checkpoint is whole" in errors, errors[-3000:]
    [newest] = complete_checkpoints(recipe.train.output)
    assert 3 <= newest.step < 120
    assert not [member for member in family if member.is_running()]


def test_a_run_whose_progress_nobody_reads_goes_on(make_recipe: Any, tmp_path: Path) -> None:
    """As when the connection breaks over which a launcher shows it; the launcher then sends SIGTERM."""
    recipe = make_recipe(max_steps=6)
    process = start_job(recipe, tmp_path, json_document=False)
    assert process.stderr is not None and "step 1/6" in process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=TIMEOUT_SECONDS) == 0
    assert (recipe.train.output / "summary.json").exists()
