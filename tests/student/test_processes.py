"""Several processes learn what one learns; no process meets the teacher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from student.runs import log_of, losses_of
from teachercache.models import load_causal_lm
from teachercache.student.train import run_training

from builders import scaled_student, sentences, tiny_cache

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT / "pipeline"),
    "OMP_NUM_THREADS": "1",
}
TIMEOUT_SECONDS = 240  # processes that do not find each other would wait for half an hour
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def _deepspeed() -> list[str]:
    """The launcher as users call it; it hands its port on as it is, so that 0 would be another port in each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [str(BIN / "deepspeed"), "--no_local_rank", "--num_gpus", "2", "--master_port", str(port)]


def _without_dropout(student: Path, folder: Path) -> Path:
    model = load_causal_lm(str(student))
    model.config.attention_dropout = 0.0
    model.save_pretrained(folder)
    return folder


def _write(recipe: Any, path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return path


def _compare(
    make_recipe: Any, student: Path, folder: Path, *, launcher: list[str], **settings: Any
) -> subprocess.CompletedProcess[str]:
    plain = _without_dropout(student, folder / "plain")
    one = make_recipe(output=folder / "one", student_model=plain, **settings)
    two = make_recipe(output=folder / "two", student_model=plain, **settings)
    run_training(one)
    job = [str(ROOT / "jobs" / "train_student.py"), str(_write(two, folder / "two.yaml")), "--json"]
    done = subprocess.run(
        [*launcher, *job], capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses_of(two.train.output), losses_of(one.train.output), atol=1e-5)
    for ours, theirs in zip(log_of(two.train.output), log_of(one.train.output), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    return done


def test_two_processes_under_zero_2_learn_what_one_learns(make_recipe: Any, student: Path, tmp_path: Path) -> None:
    """As users run it: `deepspeed jobs/train_student.py`."""
    done = _compare(make_recipe, student, tmp_path, launcher=_deepspeed(), zero_stage=2, loader_workers=1)
    [document] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # beside the launcher's own lines
    assert json.loads(document)["zero_stage"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_processes_learn_what_one_learns(make_recipe: Any, student: Path, tmp_path: Path, stage: int) -> None:
    # One micro-batch for two processes: one of them has nothing but padding.
    done = _compare(make_recipe, student, tmp_path, launcher=TORCHRUN, zero_stage=stage, micro_batch=8)
    assert json.loads(done.stdout)["zero_stage"] == stage  # one document, from one of the processes


@pytest.mark.slow
def test_two_processes_learn_from_two_caches_what_one_learns(make_recipe: Any, student: Path, tmp_path: Path) -> None:
    other = tiny_cache(tmp_path / "other", texts=sentences(40, seed=7), precompute={"unit_rows": 6})
    stream = {"window": 2, "mix": [{"cache": str(other), "share": 0.3}]}
    _compare(make_recipe, student, tmp_path, launcher=TORCHRUN, zero_stage=2, micro_batch=8, stream=stream)


@pytest.mark.slow
def test_a_student_that_scales_its_logits_learns_in_processes_without_a_share(
    make_recipe: Any, student: Path, tmp_path: Path
) -> None:
    """All processes form the loss the same way, also those whose first batch is empty: else collectives would hang."""
    _compare(make_recipe, scaled_student(tmp_path / "scaled"), tmp_path, launcher=TORCHRUN, zero_stage=3, micro_batch=8)


PROGRAM = """
import sys
from teachercache.config import load_recipe
from teachercache.student.train import run_training
run_training(load_recipe(sys.argv[1]))
forbidden = ("ray", "datasets", "teachercache.teacher", "teachercache.precompute", "teachercache.corpus")
print([name for name in forbidden if name in sys.modules])
"""


def test_training_never_meets_the_teacher(make_recipe: Any, cache: Path, tmp_path: Path) -> None:
    """The fixture has deleted the teacher's folder; what is left of it in the cache are a config, a tokenizer, and which tokens
    begin a new pre-token."""
    assert not (cache.parent / "teacher").exists()
    weights = [path for path in cache.rglob("*") if path.suffix in {".safetensors", ".bin", ".pt", ".gguf"}]
    assert [path.name.partition("-")[0] for path in weights] == ["boundary"]
    path = _write(make_recipe(max_steps=2), tmp_path / "recipe.yaml")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, env=ENVIRONMENT, check=True,
        timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    assert done.stdout.strip() in {"[]", "['datasets']"}  # transformers.Trainer imports datasets where it is installed
