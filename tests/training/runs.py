"""Jobs in processes of their own, and what a run folder says about a run."""

from __future__ import annotations

import json
import os
import shutil
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

CLOCKED = {"positions_per_second", "waiting_for_data", "eval_seconds"}
JOB = Path(__file__).parents[2] / "jobs" / "train_student.py"


def start_job(recipe: Recipe, folder: Path, *, processes: int = 1, json_document: bool = True) -> subprocess.Popen[str]:
    """The job as users run it; `torchrun` where it has several processes."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(JOB), str(path)]
    if json_document:
        command.append("--json")
    environment = {**os.environ, "PYTHONPATH": str(JOB.parents[1] / "pipeline")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def kill_after(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """SIGKILL a job and its processes once a checkpoint of `step` or later is whole."""
    while all(int(marker.parent.name.split("-")[1]) < step for marker in run.glob("checkpoint-*/complete.json")):
        if process.poll() is not None:
            pytest.fail(f"the job ended by itself: {process.communicate()[1][-2000:]}")
        time.sleep(0.002)
    kill(process)
    assert not (run / "summary.json").exists(), "it was killed too late"


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a job and its processes, the launcher too."""
    for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        member.send_signal(signal.SIGKILL)
    process.communicate()


def cut_back(run: Path, step: int) -> None:
    """The folder of a finished run as it was when the checkpoint of a step had just become whole."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "student")
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def cut_copy(run: Path, copy: Path, step: int) -> None:
    """As if a job with the same settings in another folder had died right after the checkpoint of a step."""
    cut_back(Path(shutil.copytree(run, copy)), step)


def modules_of(_: Any) -> set[str]:
    """Modules that the process which runs this has imported; in the place of a collator."""
    return set(sys.modules)


def log_of(run: Path) -> list[dict[str, Any]]:
    """Log records of a run without what a clock put there."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key not in CLOCKED} for record in records]


def losses_of(run: Path) -> list[float]:
    """Training loss by logging window."""
    return [record["loss"] for record in log_of(run) if "loss" in record]
