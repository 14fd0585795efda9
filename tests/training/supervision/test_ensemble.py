"""Training from the caches of several teachers."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from teachercache.cache import Cache
from teachercache.errors import CacheError, RecipeError, UserError
from teachercache.models.loading import load_causal_lm
from teachercache.training.job.train import run_training
from teachercache.training.supervision.ensemble import Teachers
from training.runs import cut_copy, log_of, losses_of, start_job

from builders import (
    aligned,
    other_student,
    other_tokenizer,
    sentences,
    tiny_cache,
    tiny_model,
    tiny_teacher,
    tiny_tokenizer,
)
from s3_server import Server

TOP_K = {"logits": {"kind": "top-k", "k": 16, "dtype": "float32"}}
SKETCH = {"logits": {"kind": "head+sketch", "k": 8, "rank": 16, "calibration_positions": 600}}


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher's cache of the same text: another kind of targets, another head size, other shards."""
    folder = tmp_path_factory.mktemp("second")
    teacher = tiny_teacher(folder / "teacher", seed=5)
    return tiny_cache(folder, teacher=teacher, targets=SKETCH, precompute={"unit_rows": 7})


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third teacher's, of half of the text, with other rows held out, and some text of its own."""
    folder = tmp_path_factory.mktemp("half")
    teacher = tiny_teacher(folder / "teacher", seed=6)
    texts = [*sentences(5, seed=3), *sentences(40)[:20]]
    return tiny_cache(folder, teacher=teacher, texts=texts, targets=TOP_K, corpus={"held_out": 0.5})


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A teacher with another tokenizer, aligned with that of the first cache."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = other_tokenizer()
    teacher = folder / "teacher"
    tiny_model(vocabulary=len(tokenizer), seed=7).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    made = tiny_cache(folder, teacher=teacher, targets=TOP_K, sequence={"length": 60})
    tiny_tokenizer().save_pretrained(folder / "reader")
    aligned(made, folder / "reader")
    return made


def _teachers(*caches: Path | str | dict[str, Any], **settings: Any) -> dict[str, Any]:
    given = [each if isinstance(each, dict) else {"cache": str(each)} for each in caches]
    return {"caches": given, **settings}


def _taught(make_recipe: Any, teachers: dict[str, Any], **settings: Any) -> Any:
    """The recipe with teachers, which are no argument of the fixture."""
    from teachercache.config import parse_recipe

    recipe = make_recipe(**settings)
    data = recipe.model_dump(mode="json", exclude_none=True)
    return parse_recipe({**data, "teachers": teachers}, origin="tests")


def _weights_of(run: Path) -> list[list[float]]:
    records = [record for record in log_of(run) if "weight_teacher_0" in record]
    return [[value for name, value in record.items() if name.startswith("weight_teacher_")] for record in records]


def _bytes_of(recipe: Any) -> bytes:
    return (recipe.train.output / "student" / "model.safetensors").read_bytes()


# --------------------------------------------------------------------- learning


@pytest.mark.parametrize("fusion", ["arithmetic", "geometric"])
def test_a_student_comes_nearer_to_both_teachers(make_recipe: Any, second: Path, fusion: str) -> None:
    teachers = _teachers(second, fusion=fusion, weights="validation-student", tau=0.5)
    recipe = _taught(make_recipe, teachers, epochs=3, evaluate_every=6, objective={"alpha": 1.0})
    console = Console(file=io.StringIO(), width=400)
    summary = run_training(recipe, console=console)
    evaluated = [record for record in log_of(recipe.train.output) if "eval_loss" in record]
    for name in ("eval_kl_teacher_0", "eval_kl_teacher_1"):
        assert evaluated[-1][name] < evaluated[0][name]
    total = Cache.open(recipe.cache).rows_of("train")
    assert f"teacher {second}: has {total} of the rows to train on\n" in console.file.getvalue()  # type: ignore[attr-defined]
    first, other = summary["teachers"]
    assert (first["cache"], first["rows"], first["missing"]) == (str(recipe.cache), total, 0)
    assert (other["cache"], other["rows"], other["missing"]) == (str(second), total, 0)
    assert first["weight"] + other["weight"] == pytest.approx(1) and 0 < other["weight"] < 1
    assert summary["teachers"] == json.loads((recipe.train.output / "summary.json").read_text())["teachers"]


def test_weights_follow_the_students_distance_from_each_teacher(make_recipe: Any, second: Path) -> None:
    recipe = _taught(make_recipe, _teachers(second, weights="validation-student", tau=0.1), evaluate_every=4)
    run_training(recipe)
    weights = _weights_of(recipe.train.output)
    assert weights[:4] == [[0.5, 0.5]] * 4  # equal until the first evaluation
    first = next(record for record in log_of(recipe.train.output) if "eval_loss" in record)
    z = [math.exp(-first[f"eval_kl_teacher_{number}"] / 0.1) for number in (0, 1)]
    assert weights[4] == pytest.approx([each / sum(z) for each in z], rel=1e-4)
    assert weights[8] != weights[4]


def test_weights_that_follow_evaluations_ask_for_the_same_evaluations(make_recipe: Any, second: Path) -> None:
    """Weights that do not follow evaluations: how often a run evaluates decides nothing of what is learned."""
    teachers = _teachers(second, weights="validation-student", tau=0.1)
    run_training(_taught(make_recipe, teachers, evaluate_every=4))
    with pytest.raises(RecipeError, match=r"train.evaluate_every was 4, now 3"):
        run_training(_taught(make_recipe, teachers, evaluate_every=3))


def test_a_teacher_of_weight_zero_teaches_nothing(make_recipe: Any, second: Path, tmp_path: Path) -> None:
    """Bit by bit what the cache alone teaches, with the tail that fusion takes."""
    objective = {"tail": "uniform"}
    alone = make_recipe(output=tmp_path / "alone", objective=objective)
    both = _taught(
        make_recipe, _teachers({"cache": str(second), "weight": 0.0}), output=tmp_path / "both", objective=objective
    )
    run_training(alone)
    run_training(both)
    assert losses_of(both.train.output) == losses_of(alone.train.output)
    assert _bytes_of(both) == _bytes_of(alone)


def test_how_a_step_is_computed_does_not_change_its_loss(
    make_recipe: Any, plain_student: Path, second: Path, half: Path, foreign: Path, tmp_path: Path
) -> None:
    found = []
    for name, settings in {
        "one": {}, "packed": {"pack": True, "micro_batch": 8}, "workers": {"loader_workers": 1, "micro_batch": 4},
    }.items():  # fmt: skip
        recipe = _taught(
            make_recipe, _teachers(second, half, foreign, weights="confidence"), output=tmp_path / name, max_steps=4,
            student_model=plain_student, **settings,
        )  # fmt: skip
        run_training(recipe)
        found.append(losses_of(recipe.train.output))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4)


def test_a_teacher_with_another_tokenizer_speaks_where_its_tokens_begin(
    make_recipe: Any, foreign: Path, tmp_path: Path
) -> None:
    recipe = _taught(make_recipe, _teachers(foreign, weights="confidence"), max_steps=3)
    summary = run_training(recipe)
    assert 0 < summary["teachers"][1]["weight"] < summary["teachers"][0]["weight"] < 1
    assert (
        summary["teachers"][1]["rows"] > 0 and summary["teachers"][1]["missing"] > 0
    )  # of windows that begin elsewhere
    other = _taught(make_recipe, _teachers({"cache": str(foreign), "weight": 1.0}), output=tmp_path / "o", max_steps=3)
    run_training(other)  # its own alone, completed by the first
    assert losses_of(other.train.output) != losses_of(recipe.train.output)
    assert all(math.isfinite(loss) for loss in losses_of(other.train.output))


def test_a_vocabulary_with_more_tokens_at_its_end_needs_no_alignment(make_recipe: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|extra_0|>", "<|extra_1|>"])
    tiny_model(vocabulary=len(tokenizer), seed=8).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    longer = tiny_cache(tmp_path, teacher=tmp_path / "teacher", targets=TOP_K)
    summary = run_training(_taught(make_recipe, _teachers(longer), max_steps=2))
    assert summary["teachers"][1]["missing"] == 0
    assert summary["teachers"][1]["weight"] == pytest.approx(0.5, rel=1e-5)


def test_domains_have_weights_of_their_own(make_recipe: Any, second: Path, tmp_path: Path) -> None:
    mixed = tiny_cache(tmp_path, texts=sentences(30, seed=7), targets=TOP_K)
    mixed = mixed.rename(mixed.parent / "poems")
    teachers = _teachers(second, domains={"poems": [1.0, 0.0], "cache": [0.25, 0.75]})
    recipe = _taught(make_recipe, teachers, stream={"mix": [{"cache": str(mixed)}]}, max_steps=3)
    opened = [Cache.open(recipe.cache), Cache.open(mixed)]
    made = Teachers.of(recipe.teachers, opened, [Cache.open(second)])
    assert made.priors == ((0.25, 0.75), (1.0, 0.0))
    run_training(recipe)
    assert all(sum(weights) == pytest.approx(1) for weights in _weights_of(recipe.train.output))


# --------------------------------------------------------------------- missing rows


def test_rows_that_a_cache_lacks_are_counted_and_follow_the_policy(
    make_recipe: Any, plain_student: Path, half: Path, tmp_path: Path
) -> None:
    total = 0
    losses, weights = {}, {}
    for policy in ("others", "skip"):
        recipe = _taught(
            make_recipe, _teachers(half, missing=policy), output=tmp_path / policy, max_steps=6, objective={"alpha": 1.0},
            student_model=plain_student,
        )  # fmt: skip
        console = Console(file=io.StringIO(), width=400)
        summary = run_training(recipe, console=console)
        _, other = summary["teachers"]
        total = Cache.open(recipe.cache).rows_of("train")
        assert 0 < other["missing"] < total and other["rows"] + other["missing"] == total
        assert f"has {other['rows']} of the rows to train on; {other['missing']} are missing" in console.file.getvalue()  # type: ignore[attr-defined]
        losses[policy], weights[policy] = losses_of(recipe.train.output), _weights_of(recipe.train.output)
    share = [of_both[1] for of_both in weights["others"]]
    assert all(sum(each) == pytest.approx(1) for each in weights["others"]) and 0 < share[0] < 0.5
    # Where the second teacher has the row both weigh as before; elsewhere nobody does.
    assert [each[1] for each in weights["skip"]] == pytest.approx(share)
    assert [each[0] for each in weights["skip"]] == pytest.approx(share)
    assert losses["skip"][0] < losses["others"][0]


# --------------------------------------------------------------------- validation, resume, processes


def test_validation_weighs_teachers_by_their_own_losses(make_recipe: Any, second: Path) -> None:
    recipe = _taught(make_recipe, _teachers(second, weights="validation", tau=0.3), max_steps=3)
    run_training(recipe)
    opened = [Cache.open(recipe.cache), Cache.open(second)]
    losses = []
    for cache in opened:
        nats = positions = 0
        for index in range(cache.rows_of("held-out")):
            stored = cache.read_row("held-out", index)
            nats -= float(cache.kind.decoded(stored.targets)["actual_log_prob"].sum())
            positions += stored.row.positions
        losses.append(nats / positions)
    z = [math.exp(-loss / 0.3) for loss in losses]
    expected = [each / sum(z) for each in z]
    assert _weights_of(recipe.train.output) == [pytest.approx(expected, rel=1e-4)] * 3


def test_a_killed_run_goes_on_with_the_weights_that_it_had(make_recipe: Any, second: Path, tmp_path: Path) -> None:
    teachers = _teachers(second, weights="validation-student", tau=0.05)
    settings = {"epochs": 2, "save_every": 3, "evaluate_every": 3, "keep_checkpoints": 9}
    whole = _taught(make_recipe, teachers, output=tmp_path / "whole", **settings)
    killed = _taught(make_recipe, teachers, output=tmp_path / "killed", loader_workers=1, **settings)
    run_training(whole)
    cut_copy(whole.train.output, killed.train.output, 6)
    state = json.loads((killed.train.output / "checkpoint-6" / "objective_state.json").read_text())
    assert state["teachers"]["factors"] != [1, 1]
    assert run_training(killed)["resumed_from"] == 6
    assert log_of(killed.train.output) == log_of(whole.train.output)
    assert _bytes_of(killed) == _bytes_of(whole)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(
    make_recipe: Any, plain_student: Path, second: Path, half: Path, foreign: Path, tmp_path: Path
) -> None:
    teachers = _teachers(second, half, foreign, weights="validation-student", tau=0.2)
    runs = []
    for count in (1, 2):
        recipe = _taught(
            make_recipe,
            teachers,
            output=tmp_path / str(count),
            student_model=plain_student,
            zero_stage=2,
            micro_batch=8,
        )
        (tmp_path / f"r{count}").mkdir()
        job = start_job(recipe, tmp_path / f"r{count}", processes=count)
        assert job.wait() == 0, job.communicate()[1][-2000:]
        runs.append(recipe.train.output)
    for ours, theirs in zip(log_of(runs[1]), log_of(runs[0]), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_teachers_at_urls_teach_what_their_folders_do(
    make_recipe: Any, half: Path, foreign: Path, s3: Server, tmp_path: Path, workers: int
) -> None:
    """Each shard is fetched once, for the match and for training."""
    urls = [s3.upload(each, f"teachers/{each.parent.name}{workers}") for each in (half, foreign)]
    stream = {"local": str(tmp_path / "copies"), "local_bytes": "1 GB"}
    settings = {"weights": "confidence", "missing": "others"}
    there = _taught(
        make_recipe, _teachers(*urls, **settings), output=tmp_path / "there", stream=stream, loader_workers=workers
    )
    here = _taught(make_recipe, _teachers(half, foreign, **settings), output=tmp_path / "here", loader_workers=workers)
    before = s3.downloads("shards/part")
    steps = run_training(there)["steps"]
    shards = sum(len(Cache.open(each).infos) for each in (half, foreign))
    assert s3.downloads("shards/part") - before <= 2 * shards  # and those of the alignment
    run_training(here)
    assert log_of(there.train.output) == log_of(here.train.output)
    assert _bytes_of(there) == _bytes_of(here)
    (there.train.output / "summary.json").unlink()
    moved = _taught(make_recipe, _teachers(half, foreign, **settings), output=tmp_path / "there")
    assert run_training(moved)["resumed_from"] == steps  # a run belongs to caches, wherever they lie


def test_other_teachers_do_not_go_on_with_a_run(make_recipe: Any, second: Path, half: Path) -> None:
    run_training(_taught(make_recipe, _teachers(second), max_steps=2))
    with pytest.raises(RecipeError, match=r"teachers.caches.0 was .*use another train.output"):
        run_training(_taught(make_recipe, _teachers(half), max_steps=2))
    with pytest.raises(RecipeError, match=r"teachers.fusion was \"arithmetic\", now \"geometric\""):
        run_training(_taught(make_recipe, _teachers(second, fusion="geometric"), max_steps=2))


# --------------------------------------------------------------------- refusals


def _refused(recipe: Any, kind: type[UserError] = CacheError) -> str:
    with pytest.raises(kind) as refusal:
        run_training(recipe)
    assert not list(recipe.train.output.glob("checkpoint-*")) and "\n" not in str(refusal.value)
    return str(refusal.value)


def test_missing_rows_can_be_refused(make_recipe: Any, half: Path) -> None:
    message = _refused(_taught(make_recipe, _teachers(half, missing="refuse")))
    assert "lacks" in message and "set teachers.missing to others or skip" in message


def test_caches_without_a_row_in_common(make_recipe: Any, second: Path, tmp_path: Path) -> None:
    teacher = second.parent / "teacher"
    apart = tiny_cache(tmp_path / "apart", teacher=teacher, texts=sentences(20, seed=11), targets=TOP_K)
    message = _refused(_taught(make_recipe, _teachers(apart)))
    assert "none of the rows to train on" in message and "from the same corpus" in message
    packed = tiny_cache(
        tmp_path / "packed", teacher=teacher, targets=TOP_K, sequence={"layout": "packed", "length": 150}
    )
    assert "packed alike" in _refused(_taught(make_recipe, _teachers(packed)))


def test_the_same_cache_twice(make_recipe: Any, cache: Path, second: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "copy")
    assert "is the same cache as" in _refused(_taught(make_recipe, _teachers(tmp_path / "copy")))
    assert "is the same cache as" in _refused(_taught(make_recipe, _teachers(second, second)))


def test_a_cache_that_is_not_aligned(make_recipe: Any, foreign: Path, tmp_path: Path) -> None:
    shutil.copytree(foreign, tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain" / "alignments")
    assert "teachercache align" in _refused(_taught(make_recipe, _teachers(tmp_path / "plain")))


def test_a_student_with_another_tokenizer(make_recipe: Any, cache: Path, second: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    student = other_student(tmp_path / "student")
    aligned(tmp_path / "cache", student)
    recipe = _taught(make_recipe, _teachers(second), cache_folder=tmp_path / "cache", student_model=student)
    assert "give as `cache` one of the student's tokenizer" in _refused(recipe, RecipeError)


def test_nothing_to_learn_from_teachers(make_recipe: Any, second: Path) -> None:
    recipe = _taught(make_recipe, _teachers(second), objective={"alpha": 0.0})
    assert "objective.alpha is 0" in _refused(recipe, RecipeError)


def test_a_temperature_that_one_cache_lacks(make_recipe: Any, second: Path) -> None:
    message = _refused(_taught(make_recipe, _teachers(second), objective={"temperature": 3.0}))
    assert "1, 2, 4, 8" in message


def test_no_held_out_row_in_all_caches(make_recipe: Any, second: Path, tmp_path: Path) -> None:
    few = tiny_cache(tmp_path, teacher=second.parent / "teacher", corpus={"held_out": 0.0}, targets=TOP_K)
    recipe = _taught(make_recipe, _teachers(second, weights="validation"), cache_folder=few)
    assert "larger corpus.held_out, or use weights: fixed or confidence" in _refused(recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.9, "caches": [{"cache": "b", "weight": 0.3}]}, "sum to 1.2, and must sum to 1"),
        ({"caches": [{"cache": "b", "weight": 0.8}, {"cache": "c", "weight": 0.4}]}, "sum to 1.2"),
        ({"weight": 0.2, "caches": [{"cache": "b", "weight": 0.3}]}, "which then gets the rest"),
        ({"caches": [{"cache": "b", "weight": -0.1}]}, "greater than or equal to 0"),
        ({"caches": [{"cache": "b"}], "domains": {"a": [0.5, 0.5, 0.0]}}, "3 weights for 2 teachers"),
        ({"caches": [{"cache": "b"}], "domains": {"a": [0.5, 0.6]}}, "sum to 1.1"),
        ({"caches": [{"cache": "b"}], "tau": 0.5}, "tau means nothing to weights: fixed"),
        ({"caches": [{"cache": "b"}], "fussion": "geometric"}, "did you mean `fusion`"),
        ({"caches": []}, "at least 1 item"),
    ],
)
def test_recipes_that_make_no_sense(make_recipe: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refusal:
        _taught(make_recipe, settings)
    assert "\n" not in str(refusal.value)


def test_domains_that_no_cache_is_called(make_recipe: Any, second: Path) -> None:
    recipe = _taught(make_recipe, _teachers(second, domains={"cachee": [0.5, 0.5]}))
    assert "did you mean cache?" in _refused(recipe, RecipeError)


def test_an_exported_student_loads(make_recipe: Any, second: Path) -> None:
    summary = run_training(_taught(make_recipe, _teachers(second), max_steps=1))
    assert torch.isfinite(next(load_causal_lm(summary["student"]).parameters())).all()
