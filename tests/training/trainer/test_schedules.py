"""Schedules, balances and phases in training: what is logged is what was learned by, and a killed run goes on in the middle of
each of them, bit by bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheError, RecipeError
from teachercache.objective.objective_schedule import ObjectiveSchedule
from teachercache.training.callbacks.step_losses import STATE
from teachercache.training.job.train import run_training
from training.processes import TORCHRUN, compare_with_one
from training.runs import cut_copy, kill_after, log_of, losses_of, start_job

from builders import sentences, tiny_cache, tiny_teacher

# Each changes at every step, or follows the losses; together they are all that there is.
CHANGES: dict[str, dict[str, Any]] = {
    "linear": {"temperature": {"schedule": "linear", "start": 4, "rate": 0.75, "floor": 1.5}},
    "phases": {"temperature": {"schedule": "phases", "values": [5, 3, 1], "at": [0.3, 0.7]}},
    "cosine": {"temperature": {"schedule": "cosine", "start": 5, "end": 1}},
    "alpha": {"alpha": {"schedule": "linear", "start": 0.9, "end": 0.0}},
    "student-loss": {"temperature": {"schedule": "student-loss", "base": 3, "most": 6, "strength": 60, "window": 3}},
    "ratio": {"alpha": {"balance": "ratio", "window": 3}},
    "uncertainty": {"alpha": {"balance": "uncertainty", "window": 3}},
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 train rows whose targets are whole distributions: any temperature."""
    folder = tmp_path_factory.mktemp("full")
    teacher = tiny_teacher(folder / "teacher")
    made = tiny_cache(folder, teacher=teacher, targets={"logits": {"kind": "full"}})
    shutil.rmtree(teacher)
    return made


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another corpus by another teacher of the same tokenizer, in a folder called `domain`."""
    folder = tmp_path_factory.mktemp("other")
    teacher = tiny_teacher(folder / "teacher", seed=5)
    cache = tiny_cache(folder, teacher=teacher, texts=sentences(30, seed=9), targets={"logits": {"kind": "full"}})
    return cache.rename(folder / "domain")


@pytest.fixture
def make(make_recipe: Any, full: Path) -> Any:
    def made(**settings: Any) -> Any:
        return make_recipe(**{"cache_folder": full, "max_steps": 12, "evaluate_every": 100, **settings})

    return made


def schedule_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "course.jsonl").read_text(encoding="utf-8").splitlines()]


def phases_over(domain: Path) -> dict[str, Any]:
    """Three phases that differ in everything that a phase can change."""
    return {
        "stream": {"mix": [{"cache": str(domain)}]},
        "phases": [
            {"name": "general", "steps": 4, "mix": {"cache": 1.0}, "temperature": 4},
            {
                "name": "domain", "steps": 5, "mix": {"cache": 0.25, "domain": 0.75}, "temperature": 2,
                "global_batch": 12, "learning_rate_factor": 0.5,
            },
            {
                "name": "detail", "steps": 3, "mix": {"domain": 1.0}, "global_batch": 4, "learning_rate_factor": 0.1,
                "temperature": 1, "alpha": {"schedule": "linear", "start": 0.5, "end": 0.2},
            },
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_loss_of_each_step_is_by_what_is_logged_for_it(make: Any, name: str) -> None:
    recipe = make(objective=CHANGES[name])
    run_training(recipe)
    steps = [record for record in log_of(recipe.train.output) if "loss" in record]
    logged = schedule_of(recipe.train.output)
    assert [record["step"] for record in logged] == list(range(1, 13))
    for record, held in zip(steps, logged, strict=True):
        temperature, alpha = record.get("temperature", 1.0), record["alpha"]
        assert (alpha, record.get("temperature")) == (held["alpha"], held.get("temperature"))
        expected = alpha * temperature**2 * record.get("kl", 0.0) + (1 - alpha) * record["ce"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert len({(each["alpha"], each.get("temperature")) for each in logged}) > 2
    if not ObjectiveSchedule(recipe.objective, steps=12).adapts:
        pure = [ObjectiveSchedule(recipe.objective, steps=12).at(step) for step in range(12)]
        assert [each["alpha"] for each in logged] == [weights.alpha for weights in pure]


def test_a_rule_hears_the_losses_of_the_global_batch(make: Any) -> None:
    """Replayed from the log: the balance that training used is the one that its losses ask for."""
    recipe = make(objective=CHANGES["ratio"])
    run_training(recipe)
    replay = ObjectiveSchedule(recipe.objective, steps=12)
    for step, record in enumerate(record for record in log_of(recipe.train.output) if "loss" in record):
        assert record["alpha"] == pytest.approx(replay.at(step).alpha, rel=1e-12)
        replay.update(step, distillation=record["kl"] * record["temperature"] ** 2, ce=record["ce"])


@pytest.mark.parametrize("name", [*CHANGES, "in phases"])
def test_a_run_killed_in_the_middle_goes_on_as_if_nothing_had_happened(
    make: Any, domain: Path, tmp_path: Path, name: str
) -> None:
    settings = phases_over(domain) if name == "in phases" else {"objective": CHANGES[name]}
    settings |= {"save_every": 3, "keep_checkpoints": 9}
    whole, killed = (make(output=tmp_path / each, **settings) for each in ("whole", "killed"))
    run_training(whole)
    cut_copy(whole.train.output, killed.train.output, 6)
    assert run_training(killed)["resumed_from"] == 6
    assert log_of(killed.train.output) == log_of(whole.train.output)
    assert schedule_of(killed.train.output) == schedule_of(whole.train.output)
    weights = [(each.train.output / "student" / "model.safetensors").read_bytes() for each in (whole, killed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_run_killed_by_a_signal_goes_on_in_the_right_phase(make: Any, domain: Path, tmp_path: Path) -> None:
    settings = {**phases_over(domain), "objective": CHANGES["uncertainty"], "save_every": 1, "loader_workers": 1}
    whole, killed = (make(output=tmp_path / each, **settings) for each in ("whole", "killed"))
    run_training(whole)
    kill_after(start_job(killed, tmp_path), killed.train.output, 6)
    assert run_training(killed)["resumed_from"] >= 6
    assert log_of(killed.train.output) == log_of(whole.train.output)
    assert schedule_of(killed.train.output) == schedule_of(whole.train.output)


def test_a_last_line_that_a_full_disk_left_half_written_is_written_again(make: Any, tmp_path: Path) -> None:
    settings = {"objective": CHANGES["cosine"], "save_every": 3, "keep_checkpoints": 9}
    whole, damaged = (make(output=tmp_path / each, **settings) for each in ("whole", "damaged"))
    run_training(whole)
    cut_copy(whole.train.output, damaged.train.output, 6)
    path = damaged.train.output / "course.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    run_training(damaged)
    assert schedule_of(damaged.train.output) == schedule_of(whole.train.output)


def test_only_what_remembers_something_is_saved(make: Any, tmp_path: Path) -> None:
    plain, balanced = make(output=tmp_path / "plain"), make(output=tmp_path / "balanced", objective=CHANGES["ratio"])
    for recipe in (plain, balanced):
        run_training(recipe)
    assert not (plain.train.output / "checkpoint-12" / STATE).exists()
    assert not (plain.train.output / "course.jsonl").exists()
    state = json.loads((balanced.train.output / "checkpoint-12" / STATE).read_text())
    assert state["course"]["alpha"]["recorded"] == 12


def test_each_phase_is_as_the_recipe_says(make: Any, domain: Path) -> None:
    recipe = make(schedule="constant", warmup_fraction=0, **phases_over(domain))
    summary = run_training(recipe)
    steps = [record for record in log_of(recipe.train.output) if "loss" in record]
    assert [record["phase"] for record in steps] == ["general"] * 4 + ["domain"] * 5 + ["detail"] * 3
    assert [record["temperature"] for record in steps] == [4] * 4 + [2] * 5 + [1] * 3
    assert [record["alpha"] for record in steps] == pytest.approx([0.7] * 9 + [0.5, 0.4, 0.3])
    rates = [record["learning_rate"] for record in steps]
    assert rates == pytest.approx([0.01] * 4 + [0.005] * 5 + [0.001] * 3)
    assert summary["rows"] == 4 * 8 + 5 * 12 + 3 * 4
    evaluated = [record["step"] for record in log_of(recipe.train.output) if "eval_loss" in record]
    assert evaluated == [4, 9, 12]  # at the end of each


def test_a_phase_without_a_teacher_learns_from_the_labels_alone(make: Any) -> None:
    phases = [{"name": "task", "share": 0.5, "alpha": 0}, {"name": "teacher", "share": 0.5, "alpha": 1.0}]
    recipe = make(phases=phases)
    run_training(recipe)
    steps = [record for record in log_of(recipe.train.output) if "loss" in record]
    assert [record["loss"] for record in steps[:6]] == pytest.approx([record["ce"] for record in steps[:6]])
    assert all("kl" not in record for record in steps[:6]) and all("kl" in record for record in steps[6:])


def test_steps_without_a_teacher_do_not_dilute_its_divergence(make: Any, tmp_path: Path) -> None:
    """Windows end with phases, and a divergence is over the positions that had one."""
    phases = [{"name": "task", "steps": 4, "alpha": 0}, {"name": "teacher", "steps": 8, "alpha": 0.7}]
    coarse, fine = (make(output=tmp_path / str(every), phases=phases, log_every=every) for every in (6, 1))
    for recipe in (coarse, fine):
        run_training(recipe)
    windows, steps = ([r for r in log_of(each.train.output) if "loss" in r] for each in (coarse, fine))
    assert [window["step"] for window in windows] == [4, 6, 12]
    assert "kl" not in windows[0] and windows[1]["kl"] > 0
    of_window = [step for step in steps if step["step"] in (5, 6)]
    positions = sum(step["positions"] for step in of_window)
    mean = sum(step["kl"] * step["positions"] for step in of_window) / positions
    assert windows[1]["kl"] == pytest.approx(mean, rel=1e-5)


def test_phases_of_one_kind_are_a_run_without_any(make: Any, tmp_path: Path) -> None:
    one = make(output=tmp_path / "one")
    two = make(output=tmp_path / "two", phases=[{"name": "a", "steps": 5}, {"name": "b", "steps": 7}])
    run_training(one)
    run_training(two)
    assert losses_of(one.train.output) == losses_of(two.train.output)


@pytest.mark.parametrize("name", ["ratio", "uncertainty", "student-loss"])
@pytest.mark.slow
def test_rules_are_the_same_in_all_processes(make: Any, plain_student: Path, tmp_path: Path, name: str) -> None:
    compare_with_one(make, plain_student, tmp_path, launcher=TORCHRUN, objective=CHANGES[name], zero_stage=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_learn_in_phases_what_one_learns(
    make: Any, domain: Path, plain_student: Path, tmp_path: Path, stage: int
) -> None:
    """Steps of a phase with smaller batches run fewer micro-batches than Trainer counts on."""
    compare_with_one(make, plain_student, tmp_path, launcher=TORCHRUN, zero_stage=stage, **phases_over(domain))


def test_weights_of_layers_follow_their_schedule(make_recipe: Any, tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher", layers=2)
    cache = tiny_cache(tmp_path, teacher=teacher, targets={"hidden": {"layers": [1]}})
    layers = [
        {"match": "hidden-cosine", "pairs": {1: 1}, "weight": {"schedule": "linear", "start": 2, "end": 0}},
        {"match": "hidden-mse", "pairs": {1: 1}, "weight": 0.5},
    ]
    phases = [{"name": "a", "steps": 4}, {"name": "b", "steps": 2, "weights": {"hidden-mse": 0}}]
    recipe = make_recipe(cache_folder=cache, phases=phases, objective={"layers": layers, "temperature": 1.0})
    run_training(recipe)
    for number, record in enumerate(record for record in log_of(recipe.train.output) if "loss" in record):
        weights = record["weight_hidden-cosine"], record["weight_hidden-mse"]
        assert weights == pytest.approx((2 - 2 * number / 6, 0.5 if number < 4 else 0.0))
        logits = 0.7 * record["kl"] + (1 - 0.7) * record["ce"]
        layered = weights[0] * record["hidden-cosine"] + weights[1] * record["hidden-mse"]
        assert record["loss"] == pytest.approx(logits + layered, rel=1e-5)


def test_temperatures_that_a_cache_does_not_hold_are_refused_before_the_first_step(
    make: Any, cache: Path, tmp_path: Path
) -> None:
    line = {"temperature": {"schedule": "linear", "start": 4, "end": 1}}
    with pytest.raises(CacheError, match=r"temperature 1\.4.* is not on this cache's grid"):
        run_training(make(cache_folder=cache, objective=line))
    with pytest.raises(CacheError, match=r"temperature 3 is not on this cache's grid"):
        run_training(make(cache_folder=cache, phases=[{"name": "a", "share": 1, "temperature": 3}]))
    settings = {"logits": {"kind": "head+sketch", "k": 4, "rank": 4, "calibration_positions": 400}}
    sketched = tiny_cache(tmp_path, teacher=tiny_teacher(tmp_path / "teacher"), targets=settings)
    below = {"temperature": {"schedule": "linear", "start": 2, "rate": 0.75}}
    with pytest.raises(CacheError, match=r"T >= 1"):
        run_training(make(cache_folder=sketched, objective=below))
    assert not make().train.output.exists() or not any(make().train.output.glob("checkpoint-*"))


def test_a_run_of_other_phases_is_another_run(make: Any) -> None:
    phases = [{"name": "a", "steps": 6}, {"name": "b", "steps": 6, "temperature": 1}]
    run_training(make(phases=phases))
    with pytest.raises(RecipeError, match=r"holds a run with other settings \(phases.1.temperature was 1.0, now 2.0\)"):
        run_training(make(phases=[phases[0], {**phases[1], "temperature": 2}]))
    renamed = make(phases=[{**phases[0], "name": "general"}, phases[1]])
    assert run_training(renamed)["steps"] == 12  # what a phase is called decides nothing


def test_a_schedulers_own_file_and_factors_do_not_go_together(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"scheduler": {"type": "WarmupLR", "params": {}}, "zero_optimization": {"stage": 1}}))
    phases = [{"name": "a", "share": 1.0, "learning_rate_factor": 0.5}]
    with pytest.raises(RecipeError, match="has a scheduler of its own, which phases cannot change"):
        run_training(make(deepspeed=str(path), phases=phases))


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_what_rules_remember(
    make: Any, plain_student: Path, tmp_path: Path
) -> None:
    shared = {"objective": CHANGES["ratio"], "student_model": plain_student, "save_every": 4, "zero_stage": 2}
    whole, changed = (make(output=tmp_path / name, **shared) for name in ("whole", "changed"))
    run_training(whole)
    kill_after(start_job(changed, tmp_path, processes=2), changed.train.output, 4)
    assert run_training(changed)["resumed_from"] in (4, 8)
    np.testing.assert_allclose(losses_of(changed.train.output), losses_of(whole.train.output), atol=1e-5)
    alphas = [[record["alpha"] for record in schedule_of(each.train.output)] for each in (whole, changed)]
    np.testing.assert_allclose(alphas[1], alphas[0], rtol=1e-4)


def test_across_tokenizers_temperature_and_weights_follow_too(make_recipe: Any, tmp_path: Path) -> None:
    from builders import aligned, other_student

    pupil = other_student(tmp_path / "pupil", dropout=0.0)
    cache = tiny_cache(tmp_path, teacher=tiny_teacher(tmp_path / "teacher"), targets={"logits": {"kind": "full"}})
    aligned(cache, pupil)
    across = [{"match": "projected-kl", "weight": {"schedule": "linear", "start": 1, "end": 0}}]
    objective = {
        "across": across,
        "temperature": {"schedule": "cosine", "start": 3, "end": 1},
        "alpha": {"balance": "uncertainty"},
    }
    recipe = make_recipe(cache_folder=cache, student_model=pupil, max_steps=8, objective=objective)
    run_training(recipe)
    replay = ObjectiveSchedule(ObjectiveConfig.model_validate(objective), steps=8, across=True)
    for step, record in enumerate(record for record in log_of(recipe.train.output) if "loss" in record):
        held = replay.at(step)
        assert (record["alpha"], record["temperature"]) == pytest.approx((held.alpha, held.temperature))
        weighed = (record["loss"] - (1 - held.alpha) * record["ce"]) / held.alpha
        expected = held.terms["projected-kl"] * held.temperature**2 * record["projected-kl"]
        assert weighed == pytest.approx(expected, rel=1e-4) and math.isfinite(weighed)
        replay.update(step, distillation=weighed, ce=record["ce"])
