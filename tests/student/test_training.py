"""Training against a plain loop that takes one row at a time, at every ZeRO stage; what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from student.runs import losses_of
from teachercache.config import Recipe
from teachercache.errors import CacheError
from teachercache.models import load_causal_lm, load_tokenizer
from teachercache.shards import Cache, StoredRow
from teachercache.stream.batches import BatchPlan
from teachercache.student.train import run_training
from teachercache.targets import TargetKind
from teachercache.tokens.fingerprint import tokenizer_fingerprint

from builders import tiny_cache


def _row_terms(model: Any, stored: StoredRow, recipe: Recipe, kind: TargetKind) -> tuple[Tensor, int]:
    """alpha · T² · KL + (1 - alpha) · CE of one row, summed over its positions, as one would write it down."""
    row, temperature, alpha = stored.row, recipe.objective.temperature, recipe.objective.alpha
    logits_NV = model(input_ids=torch.tensor(row.input_ids_S[None]).long()).logits[0][torch.tensor(row.target_mask_S)]
    labels_N = torch.tensor(row.labels_N()).long()
    teacher = kind.softened(kind.decoded(stored.targets), temperature, tail=kind.tail_policies[0])
    student_NV = (logits_NV.double() / temperature).softmax(-1)
    if teacher.tail is not None:
        dense_NV = torch.tensor(teacher.dense())
        kl = (dense_NV.exp() * (dense_NV - student_NV.log())).sum()
    else:
        head_Nk, tail_N = torch.tensor(teacher.head_log_prob_Nk), torch.tensor(teacher.tail_log_prob_N)
        student_head_Nk = student_NV.gather(1, torch.tensor(teacher.head_ids_Nk).long())
        student_tail_N = 1 - student_head_Nk.sum(-1)
        kl = (head_Nk.exp() * (head_Nk - student_head_Nk.log())).sum() + (
            tail_N.exp() * (tail_N - student_tail_N.log())
        ).sum()
    ce = torch.nn.functional.cross_entropy(logits_NV.double(), labels_N, reduction="sum")
    return alpha * temperature**2 * kl + (1 - alpha) * ce, row.positions


def _plain_loop(recipe: Recipe, steps: int) -> list[float]:
    from transformers import get_scheduler

    assert recipe.train is not None and recipe.student is not None
    cache = Cache.open(recipe.cache)
    plan = BatchPlan(cache.rows_of("train"), recipe.train.global_batch, 1, 1, cache.manifest.fingerprint, 0)
    model = load_causal_lm(recipe.student.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.train.learning_rate, weight_decay=0)
    schedule = get_scheduler("cosine", optimizer, round(0.05 * steps), steps)
    losses = []
    for step in range(steps):
        rows = [cache.read_row("train", row) for row in plan.step_rows(step).tolist()]
        terms = [_row_terms(model, row, recipe, cache.kind) for row in rows]
        loss = sum(total for total, _ in terms) / sum(positions for _, positions in terms)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_learns_what_a_plain_loop_learns(make_recipe: Any, plain_student: Path, stage: int) -> None:
    recipe = make_recipe(student_model=plain_student, zero_stage=stage)
    result = run_training(recipe)
    losses = losses_of(recipe.train.output)
    assert result["zero_stage"] == stage and result["steps"] == len(losses) == 9
    np.testing.assert_allclose(losses, _plain_loop(recipe, 9), atol=1e-5)
    before, exported = load_causal_lm(str(plain_student)), load_causal_lm(result["student"])
    assert exported.config.to_diff_dict() == before.config.to_diff_dict()
    assert (
        tokenizer_fingerprint(load_tokenizer(result["student"]))
        == Cache.open(recipe.cache).manifest.tokenizer_fingerprint
    )
    assert sum(1 for _ in Path(result["student"]).glob("*.safetensors")) == 1 and exported.dtype == torch.float32


@pytest.mark.parametrize("stage", [1, 3])
def test_packing_a_micro_batch_changes_the_shape_of_a_step_and_not_its_loss(
    make_recipe: Any, plain_student: Path, stage: int
) -> None:
    recipe = make_recipe(student_model=plain_student, zero_stage=stage, pack=True, micro_batch=8)
    run_training(recipe)
    np.testing.assert_allclose(losses_of(recipe.train.output), _plain_loop(recipe, 9), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.3])
def test_a_sketch_teaches_at_any_temperature(
    make_recipe: Any, plain_student: Path, tmp_path: Path, temperature: float
) -> None:
    """Decoded in background processes, expanded block by block in the loss: what dense distillation gives."""
    settings = {"kind": "head+sketch", "k": 6, "rank": 16, "step": 0.1, "calibration_positions": 400}
    cache = tiny_cache(tmp_path / "sketched", targets={"logits": settings})
    recipe = make_recipe(
        cache_folder=cache, student_model=plain_student, objective={"temperature": temperature}, loader_workers=2
    )
    run_training(recipe)
    np.testing.assert_allclose(losses_of(recipe.train.output), _plain_loop(recipe, 9), atol=2e-5)


def test_a_temperature_that_a_sketch_does_not_hold_is_refused(make_recipe: Any, tmp_path: Path) -> None:
    settings = {"kind": "head+sketch", "k": 6, "rank": 16, "step": 0.1, "calibration_positions": 400}
    cache = tiny_cache(tmp_path / "sketched", targets={"logits": settings})
    with pytest.raises(CacheError, match="temperature 0.5 is below 1"):
        run_training(make_recipe(cache_folder=cache, objective={"temperature": 0.5}))


def test_a_short_last_batch_and_packed_rows(make_recipe: Any, plain_student: Path, tmp_path: Path) -> None:
    packed = tiny_cache(
        tmp_path, sequence={"layout": "packed"}, targets={"logits": {"kind": "top-k", "dtype": "float32"}}
    )
    recipe = make_recipe(cache_folder=packed, student_model=plain_student, micro_batch=3, global_batch=9, epochs=2)
    assert Cache.open(packed).rows_of("train") % 9
    run_training(recipe)
    losses = losses_of(recipe.train.output)
    assert len(losses) == 2 * -(-Cache.open(packed).rows_of("train") // 9)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_learns_nearly_the_same(make_recipe: Any, plain_student: Path, stage: int) -> None:
    recipe = make_recipe(student_model=plain_student, precision="bf16", zero_stage=stage)
    result = run_training(recipe)
    np.testing.assert_allclose(losses_of(recipe.train.output), _plain_loop(recipe, 9), rtol=0.02)
    assert load_causal_lm(result["student"], dtype="auto").dtype == torch.bfloat16


def test_without_a_teacher_it_is_plain_training(make_recipe: Any) -> None:
    result = run_training(make_recipe(objective={"alpha": 0.0, "temperature": 3.0}, max_steps=2))
    assert result["losses"]["kl"] is None
    assert result["losses"]["total"] == pytest.approx(result["losses"]["ce"])


def test_background_loading_and_checkpointed_activations_change_nothing(make_recipe: Any, tmp_path: Path) -> None:
    one = make_recipe(max_steps=4)
    other = make_recipe(max_steps=4, loader_workers=2, gradient_checkpointing=True, output=tmp_path / "other")
    run_training(one)
    run_training(other)
    np.testing.assert_allclose(losses_of(one.train.output), losses_of(other.train.output), atol=1e-6)


def _overshooting_run(make_recipe: Any, folder: Path) -> tuple[Path, dict[str, Any], dict[int, float]]:
    """A finished run whose last evaluation is not its best one, its result, and its held-out loss by step.

    A rate that overshoots makes the loss jump about; which step is the best depends on the last bit, so on the machine.
    """
    for seed in range(8):
        recipe = make_recipe(
            learning_rate=0.5, schedule="constant", warmup_fraction=0.0, epochs=2, evaluate_every=1, save_every=4,
            keep_checkpoints=1, seed=seed, output=folder / f"run-{seed}",
        )  # fmt: skip
        result = run_training(recipe)
        records = map(json.loads, (recipe.train.output / "log.jsonl").read_text().splitlines())
        losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
        if min(losses, key=losses.__getitem__) < max(losses):
            return recipe.train.output, result, losses
    raise AssertionError("eight runs were meant to get worse, and none did")


def test_the_best_checkpoint_is_kept_and_exported(make_recipe: Any, tmp_path: Path) -> None:
    run, result, losses = _overshooting_run(make_recipe, tmp_path)
    best = min(losses, key=losses.__getitem__)
    assert result["best"] == {"step": best, "loss": losses[best]}
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-12"}
    kept = load_causal_lm(str(run / f"checkpoint-{best}")).state_dict()
    assert all(
        torch.equal(kept[name], weights) for name, weights in load_causal_lm(result["student"]).state_dict().items()
    )


def test_a_finished_run_is_left_as_it_is(make_recipe: Any) -> None:
    recipe = make_recipe(max_steps=2)
    first = run_training(recipe)
    weights = (recipe.train.output / "student" / "model.safetensors").stat().st_mtime_ns
    assert run_training(recipe) == first
    assert (recipe.train.output / "student" / "model.safetensors").stat().st_mtime_ns == weights


def test_trackers_get_the_losses(make_recipe: Any) -> None:
    recipe = make_recipe(max_steps=2, trackers=["tensorboard"])
    run_training(recipe)
    assert list((recipe.train.output / "runs").rglob("events.out.tfevents.*"))
