"""Jobs of two processes beside the same run in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from teachercache.models.loading import load_causal_lm
from teachercache.training.job.train import run_training
from training.runs import log_of, losses_of

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT / "pipeline"),
    "OMP_NUM_THREADS": "1",
}
TIMEOUT_SECONDS = 600  # processes that do not find each other would wait for half an hour
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def deepspeed() -> list[str]:
    """The launcher as users call it; it hands its port on as it is, so that 0 would be another port in each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [str(BIN / "deepspeed"), "--no_local_rank", "--num_gpus", "2", "--master_port", str(port)]


def without_dropout(student: Path, folder: Path) -> Path:
    model = load_causal_lm(str(student))
    model.config.attention_dropout = 0.0
    model.save_pretrained(folder)
    return folder


def write_recipe(recipe: Any, path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return path


def compare_with_one(
    make_recipe: Any, student: Path, folder: Path, *, launcher: list[str], **settings: Any
) -> subprocess.CompletedProcess[str]:
    plain = without_dropout(student, folder / "plain")
    one = make_recipe(output=folder / "one", student_model=plain, **settings)
    two = make_recipe(output=folder / "two", student_model=plain, **settings)
    run_training(one)
    job = [str(ROOT / "jobs" / "train_student.py"), str(write_recipe(two, folder / "two.yaml")), "--json"]
    done = subprocess.run(
        [*launcher, *job], capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses_of(two.train.output), losses_of(one.train.output), atol=1e-5)
    for ours, theirs in zip(log_of(two.train.output), log_of(one.train.output), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    return done
