"""A student that trains on a GPU learns what it learns on the CPU: every kind of term, measured at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.config import ObjectiveConfig
from teachercache.models.loading import load_causal_lm
from teachercache.training.supervision.choice import supervision_of
from teachercache.training.trainer.trainer import DistillationTrainer
from training.runs import CLOCKED

from builders import aligned, other_student, tiny_cache, tiny_student, tiny_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TARGETS: dict[str, Any] = {
    "logits": {"kind": "head+sketch", "k": 16, "rank": 24},
    "hidden": {"layers": [2, 4], "step": 0.02},
    "attention": {"layers": [4], "values": True},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "logits": {"temperature": {"schedule": "linear", "start": 4, "rate": 0.5}, "alpha": {"balance": "uncertainty"}},
    "hard positions": {"emphasis": {"by": "entropy-gap", "top": 0.5}, "gradient_cosines": 2},
    "routing": {"routing": {"distillation": [1], "task": ["model.norm"]}, "layers": [{"match": "hidden-cosine"}]},
    "layers": {
        "layers": [
            {"match": "hidden-cosine", "weight": 0.5},
            {"match": "hidden-mse", "pairs": {2: 4}, "weight": 0.1},
            {"match": "attention-kl", "heads": "mix"},
            {"match": "attention-mse", "first_key": False},
            {"match": "value-relations"},
            {"match": "query-relations", "relation_heads": 2},
            {"match": "channel-correlation"},
        ],
    },
}
ACROSS = {
    "across": [{"match": "projected-kl"}, {"match": "chunk-likelihood"}, {"match": "sorted-probabilities"}],
    "layers": [{"match": "hidden-cosine"}, {"match": "attention-kl"}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    teacher = tiny_teacher(folder / "teacher", layers=4, hidden=48)
    return tiny_cache(folder, teacher=teacher, targets=TARGETS)


def records(
    cache: Path, student: Path, output: Path, objective: Any, *, on_cpu: bool, **own: Any
) -> list[dict[str, Any]]:
    arguments = TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-3, logging_steps=1,
        eval_strategy="steps", eval_steps=3, save_strategy="no", report_to="none", use_cpu=on_cpu, lr_scheduler_type="constant",
        dataloader_num_workers=0,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=load_causal_lm(str(student)), cache=Cache.open(cache), args=arguments,
        objective=ObjectiveConfig.model_validate({"alpha": 0.7, "temperature": 2.0, **objective}), **own,
    )  # fmt: skip
    assert (trainer.args.device.type == "cpu") == on_cpu
    trainer.train()
    return trainer.state.log_history


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected) >= 8
    for ours, exact in zip(found, expected, strict=True):
        assert ours.keys() == exact.keys()
        for name in exact.keys() - CLOCKED:
            # A position whose two best tokens are as good as equal may agree here and not there.
            counted = name.endswith(("accuracy", "agreement"))
            assert ours[name] == pytest.approx(exact[name], rel=5e-3, abs=0.02 if counted else 1e-3), name


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_figure_of_a_run_is_the_cpus(made: Path, tmp_path: Path, settings: Any) -> None:
    student = tiny_student(tmp_path / "student", layers=2, dropout=0.0)
    gpu, cpu = (records(made, student, tmp_path / str(on_cpu), settings, on_cpu=on_cpu) for on_cpu in (False, True))
    compare(gpu, cpu)


def test_a_student_with_another_tokenizer_too(made: Path, tmp_path: Path) -> None:
    student = other_student(tmp_path / "student", layers=2, dropout=0.0)
    aligned(made, student)
    cache = Cache.open(made)
    objective = ObjectiveConfig.model_validate({"alpha": 0.7, "temperature": 2.0, **ACROSS})
    supervision = supervision_of([cache], objective, alignments=CacheAlignment.all_of(cache))
    gpu, cpu = (
        records(made, student, tmp_path / str(on_cpu), ACROSS, on_cpu=on_cpu, supervision=supervision)
        for on_cpu in (False, True)
    )
    compare(gpu, cpu)
