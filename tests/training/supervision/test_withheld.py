"""A run over caches that hold out other shares of one corpus."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import RecipeError
from teachercache.models.loading import load_causal_lm
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.sources import Mixed, train_order
from teachercache.stream.withheld import trained_rows
from teachercache.training.job.train import run_training
from teachercache.training.trainer.trainer import DistillationTrainer

from builders import sentences, tiny_cache


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Caches of the same 40 documents by which 10 % and 50 % are held out."""
    folder = tmp_path_factory.mktemp("others")
    return [
        tiny_cache(folder / f"{share}", texts=sentences(40, seed=7), corpus={"held_out": share}) for share in (0.1, 0.5)
    ]


def test_what_is_left_out_is_said_and_a_resumed_run_is_the_run(
    make_recipe: Any, others: list[Path], tmp_path: Path
) -> None:
    little, much = map(Cache.open, others)
    left = trained_rows([little, much])
    assert left.rows[0] is not None and left.rows[1] is None
    results = []
    for name in ("whole", "cut"):
        recipe = make_recipe(
            cache_folder=others[0], stream={"mix": [{"cache": str(others[1])}]}, epochs=2, output=tmp_path / name
        )
        said = io.StringIO()
        results.append(run_training(recipe, console=Console(file=said, width=1000)))
        (line,) = [line for line in said.getvalue().splitlines() if "left out" in line]
        assert line == left.lines[0]
    assert results[0]["rows"] == 2 * (len(left.rows[0]) + much.rows_of("train"))
    last, *_ = sorted((tmp_path / "cut").glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for path in (last, tmp_path / "cut" / "student"):
        shutil.rmtree(path)
    (tmp_path / "cut" / "summary.json").unlink()
    again = run_training(recipe, console=Console(quiet=True))
    assert again["resumed_from"] is not None and again["rows"] == results[0]["rows"]
    one, two = (load_causal_lm(str(tmp_path / name / "student")).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_plan_of_all_rows_is_refused(others: list[Path], student: Path, tmp_path: Path) -> None:
    little, much = map(Cache.open, others)
    plan = BatchPlan(train_order(little, [Mixed(much)], seed=0), 4, 4, 1)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(RecipeError, match=r"left out: .* the plan was made of all rows: make it with train_order"):
        DistillationTrainer(
            model=load_causal_lm(str(student)), cache=little, mix=[Mixed(much)], plan=plan, args=args,
            objective=ObjectiveConfig(),
        )  # fmt: skip
