"""The table: processes, figures that users quote, errors that cross the process boundary."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from teachercache.config import Recipe
from teachercache.errors import CacheError, JobFailed, ModelError, RecipeError
from teachercache.evaluation import ModelSpec, evaluate, render, run_evaluation
from teachercache.evaluation.table import failure_of
from teachercache.files import same_imports
from teachercache.models.loading import load_causal_lm, load_tokenizer

from builders import other_student, sentences, tiny_cache, tiny_recipe, tiny_teacher

PROMISED = {
    "model", "loss", "perplexity", "top1_agreement", "accuracy", "latency_ms", "throughput", "memory_mb", "parameters",
    "positions",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it: the recipe, and a student (here the teacher itself)."""
    folder = tmp_path_factory.mktemp("run")
    _fit(tiny_teacher(folder / "teacher"))
    cache = tiny_cache(folder, teacher=folder / "teacher")
    tiny_teacher(folder / "before", layers=1, seed=7)
    output = folder / "output"
    shutil.copytree(folder / "teacher", output / "student")
    recipe = _recipe(folder, output)
    fingerprint = json.loads((cache / "manifest.json").read_text())["fingerprint"]
    data = {"recipe": recipe.model_dump(mode="json"), "cache_fingerprint": fingerprint}
    (output / "run.json").write_text(json.dumps(data))
    return output


def _fit(folder: Path, *, steps: int = 40) -> None:
    """Train a little, so that there is quality to keep."""
    model, tokenizer = load_causal_lm(str(folder)).train(), load_tokenizer(str(folder))
    ids = tokenizer(sentences(32, seed=3), padding=True, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def _recipe(folder: Path, output: Path) -> Recipe:
    sections: dict[str, Any] = {"student": {"model": str(folder / "before")}, "train": {"output": str(output)}}
    return tiny_recipe(folder, teacher=folder / "teacher", **sections)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def without_teacher(run: Path) -> Path:
    """Another run over the same cache, its student left as it was."""
    folder = run.parent / "cross-entropy"
    shutil.copytree(run.parent / "before", folder / "student")
    shutil.copyfile(run / "run.json", folder / "run.json")
    return folder


@pytest.fixture(scope="module")
def table(run: Path, without_teacher: Path, said: list[str]) -> dict[str, dict[str, Any]]:
    return run_evaluation(run, cross_entropy=without_teacher, progress=said.append)


def test_models_are_measured_on_the_same_positions(table: dict[str, dict[str, Any]]) -> None:
    assert list(table) == ["teacher", "student_before", "student_cross_entropy", "student_after"]
    assert table["student_cross_entropy"]["loss"] == table["student_before"]["loss"] > table["student_after"]["loss"]
    assert all(row.keys() >= PROMISED for row in table.values())
    assert len({row["positions"] for row in table.values()}) == 1
    json.dumps(table)


def test_the_last_line_says_what_was_evaluated(run: Path, said: list[str], table: dict[str, dict[str, Any]]) -> None:
    positions, rows = (table["teacher"][name] for name in ("positions", "rows"))
    assert said[-1] == f"evaluated on {positions:,} held-out positions in {rows} rows of {run.parent / 'cache'}"


def test_quality_kept_and_speed_up_relate_students_to_the_teacher(table: dict[str, dict[str, Any]]) -> None:
    teacher, before, _, after = table.values()
    assert teacher["accuracy"] > 0.1 > before["accuracy"]
    assert "quality_kept" not in teacher
    assert before["quality_kept"] == before["accuracy"] / teacher["accuracy"]
    assert after["speed_up"] == teacher["latency_ms"] / after["latency_ms"]
    same = ("loss", "accuracy", "top1_agreement", "parameters")
    assert [after[name] for name in same] == [teacher[name] for name in same]  # it is the teacher
    assert after["quality_kept"] == 1.0 and after["top1_agreement"] == 1.0
    assert before["parameters"] < teacher["parameters"] and before["top1_agreement"] < 1.0


def test_the_table_is_readable_in_100_columns(table: dict[str, dict[str, Any]]) -> None:
    large = {
        **table["teacher"],
        "parameters": 134_515_008,
        "throughput": 123456.7,
        "memory_mb": 123456.0,
        "perplexity": 4e4,
    }
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render({**table, "teacher": large}))
    text = console.export_text()
    for role in ("teacher", "student before", "entropy only", "student after"):
        assert role in text
    assert "student before: as training began" in text
    assert "…" not in text and "135M" in text and "123,457" in text


def test_a_mistake_in_the_measuring_process_comes_back_as_the_same_error(run: Path) -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        evaluate(cache=run.parent / "cache", teacher="./no-such-model", student_before=None, student_after=str(run))


def test_the_command_prints_one_json_object_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "teachercache.evaluation.measure", "--model=x", f"--cache={tmp_path / 'none'}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=same_imports())
    assert finished.returncode == 2
    assert json.loads(finished.stdout)["error"]["type"] == "CacheError"
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("status", "lines", "message"), [(-9, [], "memory"), (1, ["no json"], "status 1"), (0, [], "0")]
)
def test_a_measuring_process_that_dies_is_a_failed_job(status: int, lines: list[str], message: str) -> None:
    error = failure_of("some/model", status, lines)
    assert isinstance(error, JobFailed) and message in str(error) and "some/model" in str(error)


def test_a_recipe_without_a_trained_student_is_refused(tmp_path: Path, run: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(_recipe(run.parent, tmp_path / "output").model_dump_json())
    with pytest.raises(RecipeError, match=r"no trained student .* `teachercache train`"):
        run_evaluation(recipe)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no run folder"):
        run_evaluation(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RecipeError, match="does not hold a run"):
        run_evaluation(tmp_path)


def test_a_run_of_another_cache_is_refused(run: Path, tmp_path: Path) -> None:
    data = json.loads((run / "run.json").read_text())
    tiny_teacher(tmp_path / "student")
    (tmp_path / "run.json").write_text(json.dumps({**data, "cache_fingerprint": "0" * 64}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(_recipe(run.parent, tmp_path).model_dump_json())
    for recipe_or_run in (tmp_path, recipe):
        with pytest.raises(CacheError, match="another cache"):
            run_evaluation(recipe_or_run)


def test_a_model_with_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    from teachercache.evaluation.measure import measure

    stranger = other_student(tmp_path / "stranger")
    with pytest.raises(CacheError, match="has no alignment with the tokenizer of .*stranger"):
        measure(model=str(stranger), cache=str(run.parent / "cache"))


def test_a_spec_names_its_options(run: Path) -> None:
    from teachercache.evaluation.measure import measure

    measured = measure(model=str(run / "student"), cache=str(run.parent / "cache"), dtype="bfloat16", rows=2, batch=2)
    assert (measured["dtype"], measured["rows"], measured["throughput_batch"]) == ("bfloat16", 2, 2)
    assert ModelSpec("m").dtype == "auto"
