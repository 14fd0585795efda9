"""A run goes on with any number of processes, and learns what one uninterrupted process learns.

Where it has to be quick, two processes write checkpoints once for all tests, and this process goes on from copies.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from teachercache.cache import Cache
from teachercache.config import Recipe
from teachercache.errors import JobFailed, RecipeError
from teachercache.training.checkpoints import universal
from teachercache.training.checkpoints.completion import mark_complete
from teachercache.training.job.train import run_training
from training.runs import cut_back, kill, kill_after, log_of, losses_of, start_job

from builders import tiny_model

Copied = Callable[..., Recipe]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two processes, each made when it is first asked for."""
    return {"": tmp_path_factory.mktemp("written")}


@pytest.fixture
def by_two(written: dict[str, Path], make_recipe: Any, plain_student: Path, tmp_path: Path) -> Copied:
    """The recipe of a run in `tmp_path`, killed after step 3 of 9, in the first epoch, when two processes worked on it.
    There is weight decay, which not all parameters get."""

    def copied(name: str = "run", **settings: Any) -> Recipe:
        settings = {"save_every": 3, "evaluate_every": 9, "keep_checkpoints": 9, "weight_decay": 0.3, **settings}
        settings = {"student_model": plain_student, "zero_stage": 2, **settings}
        key = json.dumps(settings, default=str)
        if key not in written:
            made = make_recipe(output=written[""] / str(len(written)), **settings)
            job = start_job(made, tmp_path, processes=2)
            assert job.communicate()[1] is not None and job.returncode == 0
            cut_back(made.train.output, 3)
            written[key] = made.train.output
        shutil.copytree(written[key], tmp_path / name)
        return make_recipe(output=tmp_path / name, **settings)

    return copied


def _uninterrupted(recipe: Recipe, folder: Path) -> Recipe:
    assert recipe.train is not None
    whole = recipe.model_copy(update={"train": recipe.train.model_copy(update={"output": folder})})
    run_training(whole)
    return whole


def _assert_same_learning(ours: Path, theirs: Path) -> None:
    """Step by step: the same rows, schedule, clipping and held-out loss; in the end, nearly the same weights."""
    for mine, other in zip(log_of(ours), log_of(theirs), strict=True):
        assert mine == pytest.approx(other, abs=1e-3)  # `positions`, `step` and `learning_rate` are equal
    np.testing.assert_allclose(losses_of(ours), losses_of(theirs), atol=1e-5)
    for name, weights in _weights(ours).items():
        torch.testing.assert_close(weights, _weights(theirs)[name], atol=1e-4, rtol=0)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "student" / "model.safetensors")


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_one_process_goes_on_from_two(by_two: Copied, tmp_path: Path, stage: int) -> None:
    recipe, console = by_two(zero_stage=stage), Console(file=io.StringIO())
    assert recipe.train is not None
    assert run_training(recipe, console=console)["resumed_from"] == 3
    work = "converting it for 1" if stage else "going on with 1"
    assert f"resuming at step 3 of 9; its checkpoint was written by 2 processes: {work}\n" in console.file.getvalue()
    whole = _uninterrupted(recipe, tmp_path / "whole")
    _assert_same_learning(recipe.train.output, tmp_path / "whole")
    assert not [*recipe.train.output.rglob("*universal*")], "the conversion is no longer needed"
    assert "load_universal" not in (recipe.train.output / "run.json").read_text()
    assert whole.train is not None and len(set(losses_of(whole.train.output))) == 9  # so a row too many would show


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_killed_with_one_two_and_three_processes(
    make_recipe: Any, plain_student: Path, cache: Path, tmp_path: Path, stage: int
) -> None:
    """1 → 2 → 3 → 1, each killed within an epoch. Rows are proved by the losses: every step's is that of the same rows."""
    settings = {
        "epochs": 10,
        "save_every": 4,
        "evaluate_every": 20,
        "zero_stage": stage,
        "student_model": plain_student,
    }
    killed = make_recipe(output=tmp_path / "killed", learning_rate=0.003, weight_decay=0.3, **settings)
    for processes, step in ((1, 4), (2, 16), (3, 28)):
        kill_after(start_job(killed, tmp_path, processes=processes), killed.train.output, step)
    assert run_training(killed)["resumed_from"] >= 28
    _uninterrupted(killed, tmp_path / "whole")
    _assert_same_learning(killed.train.output, tmp_path / "whole")
    windows = [record["positions"] for record in log_of(killed.train.output) if "positions" in record]
    epochs = np.array(windows).reshape(10, -1).sum(axis=1)
    assert epochs.tolist() == [Cache.open(cache).positions_of("train")] * 10


@pytest.mark.slow
def test_a_group_of_which_a_process_has_no_share(make_recipe: Any, tmp_path: Path) -> None:
    """24 weights of norms, in shares of 6 for 5 processes: the last one holds only padding."""
    tiny_model(layers=1, hidden=8, seed=1).save_pretrained(tmp_path / "student")
    settings = {"student_model": tmp_path / "student", "zero_stage": 2, "save_every": 3, "epochs": 5}
    recipe = make_recipe(output=tmp_path / "run", **settings)
    kill_after(start_job(recipe, tmp_path), recipe.train.output, 3)
    kill_after(start_job(recipe, tmp_path, processes=5), recipe.train.output, 15)
    run_training(recipe)
    _uninterrupted(recipe, tmp_path / "whole")
    _assert_same_learning(recipe.train.output, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_goes_on_from_float32_weights(by_two: Copied, tmp_path: Path, stage: int) -> None:
    """Steps far smaller than bf16 can tell apart add up: were the weights rounded on the way, those before would be lost,
    which are a third of the distance."""
    recipe = by_two(zero_stage=stage, precision="bf16", learning_rate=1e-4, schedule="constant", warmup_fraction=0)
    begun = _float32_weights(tmp_path / "run" / "checkpoint-3", tmp_path)
    run_training(recipe)
    _uninterrupted(recipe, tmp_path / "whole")
    ours, theirs = (_float32_weights(tmp_path / name / "checkpoint-9", tmp_path) for name in ("run", "whole"))
    distance, rounding = (theirs - begun).norm(), (begun - begun.bfloat16()).norm()
    assert (ours - theirs).norm() < 0.05 * distance and 0.05 * distance < 0.2 * rounding


def _float32_weights(checkpoint: Path, folder: Path) -> torch.Tensor:
    """The optimizer's own weights, in the order of their names under ZeRO 1-3, in its own without."""
    shards = checkpoint / (checkpoint / "latest").read_text()
    if not [*shards.glob("*optim_states.pt")]:
        groups = torch.load(shards / "mp_rank_00_model_states.pt", weights_only=False)["optimizer"]["fp32_groups"]
        return torch.cat([weights.flatten() for group in groups for weights in group])
    copy = folder / "copies" / checkpoint.parent.name / checkpoint.name
    shutil.copytree(checkpoint, copy)
    universal.convert(copy)
    files = [path for path in sorted(copy.glob("universal/zero/*/fp32.pt")) if "lm_head" not in str(path)]
    loaded = [torch.load(path, weights_only=False) for path in files]
    return torch.cat([(found["param"] if isinstance(found, dict) else found).flatten() for found in loaded])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_loss_scale_goes_on(by_two: Copied, tmp_path: Path, stage: int) -> None:
    """A CPU does not train in fp16; but DeepSpeed scales a float32 loss as well, by the number that a checkpoint holds."""
    recipe = by_two(zero_stage=stage)
    for path in (tmp_path / "run" / "checkpoint-3" / "global_step3").glob("*optim_states.pt"):
        saved = torch.load(path, weights_only=False)
        saved["optimizer_state_dict"]["loss_scaler"].cur_scale = 4.0
        torch.save(saved, path)
    mark_complete(tmp_path / "run" / "checkpoint-3", world_size=2)
    run_training(recipe)
    [path] = (tmp_path / "run" / "checkpoint-6" / "global_step6").glob("*optim_states.pt")
    assert torch.load(path, weights_only=False)["optimizer_state_dict"]["loss_scaler"].cur_scale == 4.0
    _uninterrupted(recipe, tmp_path / "whole")
    _assert_same_learning(tmp_path / "run", tmp_path / "whole")


def test_a_conversion_killed_half_way_is_made_again(by_two: Copied, tmp_path: Path) -> None:
    recipe = by_two()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    job = start_job(recipe, tmp_path)
    while not (checkpoint / universal.TEMPORARY / universal.UNIVERSAL / "tmp").exists():
        assert job.poll() is None, job.communicate()[1][-2000:]
        time.sleep(0.001)
    converters = psutil.Process(job.pid).children(recursive=True)
    job.kill()  # it alone
    job.communicate()
    assert converters and not psutil.wait_procs(converters, timeout=60)[1], "its converter goes on without it"
    assert (checkpoint / universal.TEMPORARY).exists() and not (checkpoint / universal.MARKER).exists()
    assert run_training(recipe)["resumed_from"] == 3
    _uninterrupted(recipe, tmp_path / "whole")
    _assert_same_learning(tmp_path / "run", tmp_path / "whole")


def test_a_whole_conversion_is_used_again(by_two: Copied, tmp_path: Path) -> None:
    by_two()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    universal.convert(checkpoint)
    made = (checkpoint / universal.UNIVERSAL).stat().st_mtime_ns
    universal.convert(checkpoint)
    assert (checkpoint / universal.UNIVERSAL).stat().st_mtime_ns == made
    assert not (checkpoint / universal.TEMPORARY).exists()
    universal.discard(checkpoint)
    assert not [*checkpoint.glob("*universal*")]


@pytest.mark.parametrize(
    "damage", ["flip", *(pytest.param(d, marks=pytest.mark.slow) for d in ("missing", "marker", "digests"))]
)
def test_a_damaged_conversion_is_made_again(by_two: Copied, tmp_path: Path, damage: str, caplog: Any) -> None:
    by_two()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    universal.convert(checkpoint)
    weights = sorted(checkpoint.glob("universal/zero/*/exp_avg.pt"))[0]
    whole = torch.load(weights, weights_only=False)["param"]
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        weights.unlink()
    else:
        (checkpoint / {"marker": universal.MARKER, "digests": universal.DIGESTS}[damage]).write_text("zniversal")
    assert universal.damage_of(checkpoint) is not None
    universal.convert(checkpoint)
    assert "is damaged" in caplog.text and universal.damage_of(checkpoint) is None
    torch.testing.assert_close(torch.load(weights, weights_only=False)["param"], whole, atol=0, rtol=0)


def test_what_deepspeed_cannot_convert_is_said_in_a_line(by_two: Copied, tmp_path: Path) -> None:
    """As with an optimizer that keeps other things than Adam's two moments."""
    recipe = by_two()
    shards = tmp_path / "run" / "checkpoint-3" / "global_step3"
    for path in shards.glob("*optim_states.pt"):
        saved = torch.load(path, weights_only=False)
        for state in saved["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["momentum"] = state.pop("exp_avg")
        torch.save(saved, path)
    mark_complete(shards.parent, world_size=2)
    with pytest.raises(
        JobFailed, match=r"checkpoint-3 could not be converted .*exp_avg.*resume with as many as wrote it"
    ):
        run_training(recipe)


@pytest.mark.slow
def test_dropout_after_it_is_the_same_in_each_attempt(by_two: Copied, student: Path, tmp_path: Path) -> None:
    once, again = (by_two(name, zero_stage=0, student_model=student) for name in ("once", "again"))
    run_training(once)
    run_training(again)
    assert log_of(tmp_path / "once") == log_of(tmp_path / "again")


@pytest.mark.slow
def test_a_deepspeed_file_of_ones_own(by_two: Copied, tmp_path: Path) -> None:
    """Its optimizer and schedule go on too; and what it says about conversions is not asked for."""
    own = tmp_path / "own.json"
    own.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": 2},
                "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
                "checkpoint": {"load_universal": True},
            }
        )
    )
    recipe = by_two(deepspeed=own, warmup_fraction=0.6)
    run_training(recipe)
    _uninterrupted(recipe, tmp_path / "whole")
    _assert_same_learning(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_what_deepspeed_would_convert_wrong_is_refused(by_two: Copied, tmp_path: Path) -> None:
    """In another order of parameters it would restore other weights, and say nothing."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    recipe = by_two(deepspeed=own)
    with pytest.raises(RecipeError, match=r"written by 2 process.*round_robin_gradients.*resume with as many"):
        run_training(recipe)


def test_other_weights_than_the_checkpoints_are_noticed(by_two: Copied, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    recipe, path = by_two(), tmp_path / "run" / "checkpoint-3" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][-1] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    mark_complete(path.parent, world_size=2)
    with pytest.raises(JobFailed, match=r"written by 2 process.*restored other weights from it \(model.norm.weight\)"):
        run_training(recipe)


@pytest.mark.slow
def test_a_killed_process_ends_the_whole_job(make_recipe: Any, plain_student: Path, tmp_path: Path) -> None:
    """One of two, in the middle of a step; then the same command goes on."""
    settings = {"epochs": 10, "save_every": 4, "evaluate_every": 20, "zero_stage": 2, "student_model": plain_student}
    whole, killed = (make_recipe(output=tmp_path / name, **settings) for name in ("whole", "killed"))
    assert start_job(whole, tmp_path, processes=2).wait() == 0
    job, run = start_job(killed, tmp_path, processes=2), killed.train.output
    while not [*run.glob("checkpoint-*/complete.json")]:
        assert job.poll() is None, job.communicate()[1][-2000:]
        time.sleep(0.002)
    workers = [child for child in psutil.Process(job.pid).children() if "train_student.py" in " ".join(child.cmdline())]
    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
    try:
        errors = job.communicate(timeout=120)[1]
    except subprocess.TimeoutExpired:
        kill(job)
        raise
    assert job.returncode != 0 and not any(worker.is_running() for worker in workers)
    assert "another process of this job has ended" in errors
    assert not (run / "summary.json").exists() and not (run / "student").exists()
    assert start_job(killed, tmp_path, processes=2).wait() == 0
    assert log_of(run) == log_of(whole.train.output)
