"""The recipes of two articles: their numbers, what their smoke size changes, and that it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from teachercache.config import load_recipe
from teachercache.training.job.train import run_training

from builders import aligned, build_cache, other_student, sentences, tiny_teacher, write_corpus

RECIPES = Path(__file__).parents[1] / "jobs" / "recipes"
NAMES = ("r1_qwen", "bert_ensemble")
# What a smoke size may change: the models, how many rows, how many steps; and what a machine without an accelerator cannot do.
MODEL = {"cache", "teacher.model", "student.model", "align", "teachers.caches", "train.output"}
ROWS = {"corpus.source", "corpus.name", "corpus.split", "corpus.limit", "corpus.held_out"}
STEPS = {"train.max_steps", "train.evaluate_every"}
MACHINE = {
    "teacher.dtype", "train.precision", "precompute.actors", "precompute.gpus_per_actor",
    "precompute.positions_per_batch", "precompute.unit_bytes",
}  # fmt: skip


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: found for part, inner in value.items() for key, found in flat(inner, f"{name}.{part}".strip(".")).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_size_differs_in_models_rows_and_steps(name: str) -> None:
    full, smoke = (flat(yaml.safe_load((RECIPES / part / f"{name}.yaml").read_text())) for part in ("", "smoke"))
    differing = {key for key in full.keys() | smoke.keys() if full.get(key) != smoke.get(key)}
    assert differing <= MODEL | ROWS | STEPS | MACHINE, differing - (MODEL | ROWS | STEPS | MACHINE)
    assert {"teacher.model", "corpus.limit", "train.max_steps"} <= differing


def test_the_numbers_are_the_articles() -> None:
    r1, ensemble = (load_recipe(RECIPES / f"{name}.yaml") for name in NAMES)
    assert r1.teacher.model == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" and r1.student.model == "Qwen/Qwen2.5-1.5B"
    assert (r1.objective.temperature, r1.objective.alpha) == (3, 0.7)
    assert (r1.train.micro_batch, r1.train.global_batch, r1.train.epochs) == (32, 32 * 4, 10)
    assert (r1.train.precision, r1.train.learning_rate) == ("fp16", 3e-5) and r1.train.evaluate_every is not None
    assert (r1.corpus.source, r1.corpus.split) == ("allenai/c4", "train[:10%]")
    assert r1.targets.hidden is not None and r1.targets.hidden.layers.model_dump(exclude_none=True) == {"uniform": 12}
    assert (ensemble.objective.temperature, ensemble.objective.alpha) == (4, 0.1)
    assert (ensemble.train.global_batch, ensemble.train.learning_rate) == (256, 3e-5)
    assert ensemble.teachers is not None and 1 + len(ensemble.teachers.caches) == 3


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Overrides that put tiny models and a small corpus into a smoke recipe; everything else is the recipe's."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", sentences(40))
    return [
        f"cache={tmp_path / 'cache'}", f"teacher.model={tiny_teacher(tmp_path / 'teacher', layers=12, context=1024)}",
        f"corpus.source={corpus}", "corpus.limit=40", f"train.output={tmp_path / 'run'}", "train.trackers=[]",
        "train.loader_workers=0",
        "targets.logits.calibration_positions=600", "precompute.threads_per_actor=1",
    ]  # fmt: skip


def test_the_first_article_runs(small: list[str], tmp_path: Path) -> None:
    pupil = other_student(tmp_path / "pupil", layers=12)
    recipe = load_recipe(RECIPES / "smoke" / "r1_qwen.yaml", [*small, f"student.model={pupil}", f"align=[{pupil}]"])
    aligned(build_cache(recipe), pupil)
    summary = run_training(recipe)
    assert summary["steps"] == 4 and set(summary["losses"]) >= {"total", "ce", "projected-kl", "hidden-cosine"}
    assert (tmp_path / "run" / "student" / "config.json").is_file()


def test_the_second_article_runs(small: list[str], tmp_path: Path) -> None:
    caches = []
    for seed, name in enumerate(("b", "c"), start=2):
        teacher = tiny_teacher(tmp_path / f"teacher-{name}", seed=seed, layers=3, context=1024)
        settings = [*small, f"teacher.model={teacher}", f"cache={tmp_path / name}", "teachers=null"]
        caches.append(build_cache(load_recipe(RECIPES / "smoke" / "bert_ensemble.yaml", settings)))
    further = [f"student.model={tiny_teacher(tmp_path / 'pupil', seed=9, layers=1, context=1024)}"]
    further.append(f"teachers.caches=[{', '.join(f'{{cache: {cache}}}' for cache in caches)}]")
    recipe = load_recipe(RECIPES / "smoke" / "bert_ensemble.yaml", [*small, *further])
    build_cache(recipe)
    summary = run_training(recipe)
    assert summary["steps"] == 4 and [each["missing"] for each in summary["teachers"]] == [0, 0, 0]
