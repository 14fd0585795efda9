"""Several processes learn what one learns; no process meets the teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training.processes import (
    ENVIRONMENT,
    TIMEOUT_SECONDS,
    TORCHRUN,
    compare_with_one,
    deepspeed,
    write_recipe,
)

from builders import scaled_student, sentences, tiny_cache


def test_two_processes_under_zero_2_learn_what_one_learns(make_recipe: Any, student: Path, tmp_path: Path) -> None:
    """As users run it: `deepspeed jobs/train_student.py`."""
    done = compare_with_one(make_recipe, student, tmp_path, launcher=deepspeed(), zero_stage=2, loader_workers=1)
    [document] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # beside the launcher's own lines
    assert json.loads(document)["zero_stage"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_processes_learn_what_one_learns(make_recipe: Any, student: Path, tmp_path: Path, stage: int) -> None:
    # One micro-batch for two processes: one of them has nothing but padding.
    done = compare_with_one(make_recipe, student, tmp_path, launcher=TORCHRUN, zero_stage=stage, micro_batch=8)
    assert json.loads(done.stdout)["zero_stage"] == stage  # one document, from one of the processes


@pytest.mark.slow
def test_two_processes_learn_from_two_caches_what_one_learns(make_recipe: Any, student: Path, tmp_path: Path) -> None:
    other = tiny_cache(tmp_path / "other", texts=sentences(40, seed=7), precompute={"unit_rows": 6})
    stream = {"window": 2, "mix": [{"cache": str(other), "share": 0.3}]}
    compare_with_one(make_recipe, student, tmp_path, launcher=TORCHRUN, zero_stage=2, micro_batch=8, stream=stream)


@pytest.mark.slow
def test_a_student_that_scales_its_logits_learns_in_processes_without_a_share(
    make_recipe: Any, student: Path, tmp_path: Path
) -> None:
    """All processes form the loss the same way, also those whose first batch is empty: else collectives would hang."""
    compare_with_one(
        make_recipe, scaled_student(tmp_path / "scaled"), tmp_path, launcher=TORCHRUN, zero_stage=3, micro_batch=8
    )


PROGRAM = """
import sys
from teachercache.config import load_recipe
from teachercache.training.job.train import run_training
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
    path = write_recipe(make_recipe(max_steps=2), tmp_path / "recipe.yaml")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, env=ENVIRONMENT, check=True,
        timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    assert done.stdout.strip() in {"[]", "['datasets']"}  # transformers.Trainer imports datasets where it is installed
