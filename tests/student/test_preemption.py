"""SIGTERM as schedulers and launchers send it: to every process of a job, loaders' workers too, and more than once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from teachercache.config import Recipe
from teachercache.student.checkpoints import complete_checkpoints

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240


def _start(recipe: Recipe, folder: Path, *, launcher: list[str]) -> subprocess.Popen[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, *launcher, str(ROOT / "jobs" / "train_student.py"), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline")}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def _signal_all(family: list[psutil.Process]) -> None:
    for member in family:
        if member.is_running():
            member.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "launcher",
    [
        [],
        pytest.param(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], marks=pytest.mark.slow),
    ],
    ids=["alone", "torchrun"],
)
def test_sigterm_to_every_process_ends_a_run_with_a_checkpoint(
    make_recipe: Any, tmp_path: Path, launcher: list[str]
) -> None:
    settings = {"epochs": 20, "save_every": 1000, "evaluate_every": 1000, "loader_workers": 2}
    recipe = make_recipe(output=tmp_path / "stopped", **settings)
    process, log = _start(recipe, tmp_path, launcher=launcher), recipe.train.output / "log.jsonl"
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
    process = _start(recipe, tmp_path, launcher=[])
    assert process.stderr is not None and "step 1/6" in process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=TIMEOUT_SECONDS) == 0
    assert (recipe.train.output / "summary.json").exists()
