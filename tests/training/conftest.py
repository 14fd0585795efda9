"""One tiny cache and student for all tests of training; runs are trained in this process unless a test needs others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teachercache.config import Recipe, parse_recipe
from training.layered import LAYERED_TARGETS

from builders import tiny_cache, tiny_student, tiny_teacher

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 train rows, 12 held-out ones. The teacher that made it is gone."""
    folder = tmp_path_factory.mktemp("cache")
    teacher = tiny_teacher(folder / "teacher")
    made = tiny_cache(folder, teacher=teacher, targets={"logits": {"kind": "top-k", "k": 16, "dtype": "float32"}})
    shutil.rmtree(teacher)
    return made


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, other weights than the teacher's, no tokenizer, and dropout, so that random states matter."""
    return tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def plain_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student without dropout: a loop that batches otherwise draws otherwise."""
    return tiny_student(tmp_path_factory.mktemp("plain"), dropout=0.0)


@pytest.fixture(scope="session")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with logits, hidden states and attention of a teacher that is gone; it is wider than the students."""
    folder = tmp_path_factory.mktemp("layered")
    teacher = tiny_teacher(folder / "teacher", layers=4, hidden=48)
    made = tiny_cache(folder, teacher=teacher, targets=LAYERED_TARGETS)
    shutil.rmtree(teacher)
    return made


@pytest.fixture(scope="session")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, narrower than the teacher, with dropout."""
    return tiny_student(tmp_path_factory.mktemp("pupil"), layers=2)


@pytest.fixture(scope="session")
def plain_pupil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without dropout."""
    return tiny_student(tmp_path_factory.mktemp("plain_pupil"), layers=2, dropout=0.0)


@pytest.fixture
def make_recipe(cache: Path, student: Path, tmp_path: Path) -> MakeRecipe:
    """A recipe of 9 steps in 1.5 epochs; arguments override `train:`, and `objective`, `student`, `cache`, `stream` and
    `phases` theirs."""

    def make(
        *,
        objective: dict[str, Any] | None = None,
        stream: dict[str, Any] | None = None,
        student_model: Path = student,
        lora: dict[str, Any] | None = None,
        phases: list[dict[str, Any]] | None = None,
        cache_folder: Path | str = cache,
        output: Path = tmp_path / "run",
        **train: Any,
    ) -> Recipe:
        settings = {
            "global_batch": 8, "micro_batch": 2, "epochs": 1.5, "learning_rate": 0.01, "log_every": 1,
            "evaluate_every": 4, "max_grad_norm": 0.3, "loader_workers": 0, "trackers": [],
        }  # fmt: skip
        return parse_recipe(
            {
                "cache": str(cache_folder),
                "student": {"model": str(student_model), "lora": lora},
                "objective": {"alpha": 0.7, "temperature": 2.0} | (objective or {}),
                "stream": stream or {},
                "train": {**settings, "output": str(output), **train},
                "phases": phases or [],
            },
            origin="tests",
        )

    return make
