"""The training job on several nodes: infra/slurm/train.sbatch and the hostfile, as far as one machine without Slurm can
run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile

from teachercache.config import Recipe
from teachercache.training.job.train import run_training
from training.runs import log_of, losses_of

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "infra" / "slurm" / "train.sbatch"
TIMEOUT_SECONDS = 600

# What Slurm 22.05 was seen to do: one task a node; a task that fails makes it send SIGTERM to every process of the
# others; srun ends with the highest status.
SRUN = f"""#!{sys.executable}
import os, sys, time
import psutil
first = next(number for number, word in enumerate(sys.argv) if number and not word.startswith("--"))
tasks = [
    psutil.Popen(sys.argv[first:], env={{**os.environ, "SLURM_NODEID": str(node)}})
    for node in range(int(os.environ["SLURM_NNODES"]))
]
ended = False
while any(task.poll() is None for task in tasks):
    if not ended and any(task.poll() for task in tasks):
        ended = True
        for task in tasks:
            if task.poll() is None:
                for process in [*task.children(recursive=True), task]:
                    process.terminate()
    time.sleep(0.05)
sys.exit(max(task.returncode for task in tasks))
"""
SCONTROL = """#!/bin/sh
case $1 in
    show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


class Slurm:
    """Runs a batch script on two nodes, which are both this machine."""

    def __init__(self, folder: Path) -> None:
        self._requeued = folder / "requeued"
        programs = folder / "programs"
        programs.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT / "pipeline"),
            "REQUEUED": str(self._requeued),
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "two",
            "SLURM_CPUS_ON_NODE": "1",
            "OMP_NUM_THREADS": "1",
        }

    @property
    def requeued(self) -> int:
        return self._requeued.read_text().count("\n") if self._requeued.exists() else 0

    def start(self, recipe: Recipe, *overrides: str) -> subprocess.Popen[str]:
        assert recipe.train is not None
        path = recipe.train.output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
        environment = {**self._environment, "SLURM_JOB_ID": str(time.monotonic_ns() // 1000)}  # decides the port
        command = ["bash", str(SCRIPT), str(path), *overrides]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)

    def finish(self, recipe: Recipe) -> None:
        job = self.start(recipe)
        errors = job.communicate(timeout=TIMEOUT_SECONDS)[1]
        assert job.returncode == 0, errors[-3000:]


def _sigterm(job: subprocess.Popen[str]) -> None:
    """To every process of the steps; neither to the batch script nor to srun."""
    [srun] = psutil.Process(job.pid).children()
    for process in srun.children(recursive=True):
        process.terminate()


@pytest.mark.parametrize("script", [SCRIPT, *sorted((ROOT / "infra").glob("*.sh"))], ids=lambda path: path.name)
def test_the_shell_reads_the_scripts(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_slurm_reads_its_options_before_the_first_command() -> None:
    lines = SCRIPT.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert options and max(options) < first_command


def test_deepspeed_reads_the_hostfile() -> None:
    assert dict(fetch_hostfile(str(ROOT / "infra" / "hostfile.example"))) == {"node1": 8, "node2": 8}


@pytest.mark.slow
def test_a_preempted_job_goes_on_as_if_nothing_had_happened(make_recipe: Any, tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    settings = {"epochs": 10, "save_every": 1000, "evaluate_every": 1000, "loader_workers": 1, "zero_stage": 2}
    whole, preempted, alone = (
        make_recipe(output=tmp_path / name, **settings) for name in ("whole", "preempted", "alone")
    )
    slurm.finish(whole)
    assert slurm.requeued == 0

    job, log = slurm.start(preempted), preempted.train.output / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert job.poll() is None, job.communicate()[1][-3000:]
        time.sleep(0.01)
    _sigterm(job)
    errors = job.communicate(timeout=TIMEOUT_SECONDS)[1]
    assert job.returncode == 0 and slurm.requeued == 1, errors[-3000:]
    assert not (preempted.train.output / "summary.json").exists()

    slurm.finish(preempted)
    assert slurm.requeued == 1
    assert log_of(preempted.train.output) == log_of(whole.train.output)
    run_training(alone)  # dropout differs from one process to two: losses agree in size only
    np.testing.assert_allclose(losses_of(alone.train.output), losses_of(whole.train.output), rtol=0.2)


@pytest.mark.slow
def test_a_job_that_fails_is_not_repeated(make_recipe: Any, tmp_path: Path) -> None:
    """Also where srun ends the other nodes by SIGTERM because of it."""
    slurm = Slurm(tmp_path)
    job = slurm.start(make_recipe(), "-s", "train.nonsense=1")
    errors = job.communicate(timeout=TIMEOUT_SECONDS)[1]
    assert (job.returncode, slurm.requeued) == (1, 0)
    assert "unknown key `train.nonsense`" in errors

    job, run = slurm.start(make_recipe(epochs=100)), make_recipe().train.output
    while not (run / "log.jsonl").exists():
        assert job.poll() is None, job.communicate()[1][-3000:]
        time.sleep(0.01)
    trainer = next(
        process
        for process in psutil.Process(job.pid).children(recursive=True)
        if process.environ().get("RANK") == "1" and "train" in process.cmdline()
    )
    trainer.send_signal(signal.SIGKILL)
    job.communicate(timeout=TIMEOUT_SECONDS)
    assert (job.returncode, slurm.requeued) == (1, 0)
