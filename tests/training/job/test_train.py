"""Training against a plain loop that takes one row at a time, at every ZeRO stage; what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teachercache.cache import Cache, StoredRow
from teachercache.config import Recipe
from teachercache.errors import CacheError, RecipeError
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.sources import Mixed, train_order
from teachercache.targets import TargetKind
from teachercache.tokens.fingerprint import tokenizer_fingerprint
from teachercache.training.job.train import run_training
from training.runs import losses_of

from builders import sentences, tiny_cache, tiny_model, tiny_tokenizer


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


LEARNED: dict[str, list[float]] = {}  # by the loop, once for recipes that mean the same to it


def _plain_loop(recipe: Recipe, steps: int) -> list[float]:
    same = recipe.train.model_copy(
        update={"output": Path(), "zero_stage": 0, "precision": "fp32", "micro_batch": 1, "pack": False}
    )
    key = f"{recipe.model_copy(update={'train': same}).model_dump_json()}, {steps}"
    if key not in LEARNED:
        LEARNED[key] = _looped(recipe, steps)
    return LEARNED[key]


def _looped(recipe: Recipe, steps: int) -> list[float]:
    from transformers import get_scheduler

    assert recipe.train is not None and recipe.student is not None
    mix = [Mixed(Cache.open(each.cache), each.share) for each in recipe.stream.mix]
    caches = [Cache.open(recipe.cache), *(mixed.cache for mixed in mix)]
    order = train_order(caches[0], mix, seed=0, window=recipe.stream.window)
    plan = BatchPlan(order, recipe.train.global_batch, 1, 1)
    model = load_causal_lm(recipe.student.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.train.learning_rate, weight_decay=0)
    schedule = get_scheduler("cosine", optimizer, round(0.05 * steps), steps)
    losses = []
    for step in range(steps):
        located = [order.locate(row) for row in plan.step_rows(step).tolist()]
        rows = [(caches[source].read_row("train", row), caches[source].kind) for source, row in located]
        terms = [_row_terms(model, row, recipe, kind) for row, kind in rows]
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
    before.config.eos_token_id = 0  # what rows end with
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


@pytest.fixture(scope="module")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other rows of the same teacher, in several shards, with targets of another kind."""
    return tiny_cache(
        tmp_path_factory.mktemp("sketched"),
        texts=sentences(40, seed=7),
        targets={"logits": {"kind": "head+sketch", "k": 6, "rank": 16, "step": 0.1, "calibration_positions": 400}},
        precompute={"unit_rows": 6},
    )


@pytest.mark.parametrize("share", [None, 0.4])
def test_a_mixture_teaches_what_its_rows_teach(
    make_recipe: Any, plain_student: Path, sketched: Path, share: float | None
) -> None:
    """Two caches of different kinds, shuffled two shards at a time: what a loop over the same rows learns."""
    stream = {"window": 2, "mix": [{"cache": str(sketched), "share": share}]}
    recipe = make_recipe(student_model=plain_student, stream=stream, epochs=1, micro_batch=4, loader_workers=1)
    result = run_training(recipe)
    np.testing.assert_allclose(losses_of(recipe.train.output), _plain_loop(recipe, result["steps"]), atol=2e-5)
    assert result["rows"] == 48 + (Cache.open(sketched).rows_of("train") if share is None else 32)
    log = [json.loads(line) for line in (recipe.train.output / "log.jsonl").read_text().splitlines()]
    [*_, held_out] = [record for record in log if "eval_loss" in record]
    of_each = [Cache.open(cache).positions_of("held-out") for cache in (recipe.cache, sketched)]
    means = [held_out[f"eval_cache{number}_loss"] for number in (0, 1)]
    assert held_out["eval_loss"] == pytest.approx(np.average(means, weights=of_each))


def test_a_run_goes_on_with_its_own_mixture_alone(make_recipe: Any, sketched: Path) -> None:
    run_training(make_recipe(max_steps=2))
    with pytest.raises(RecipeError, match=r"stream.mix was \[\], now .*use another train.output"):
        run_training(make_recipe(max_steps=2, stream={"mix": [{"cache": str(sketched)}]}))
    with pytest.raises(RecipeError, match=r"stream.window was 64, now 1"):
        run_training(make_recipe(max_steps=2, stream={"window": 1}))


def test_a_run_of_an_earlier_order_does_not_go_on(make_recipe: Any) -> None:
    """Its rows came in another order: some would come twice in its epoch, and others never."""
    recipe = make_recipe(max_steps=2)
    run_training(recipe)
    path = recipe.train.output / "run.json"
    before = json.loads(path.read_text())
    del before["order"]
    path.write_text(json.dumps(before))
    with pytest.raises(RecipeError, match=r"stream.order was 1, now \d.*use another train.output"):
        run_training(recipe)


def test_caches_that_do_not_mix_are_refused(make_recipe: Any, cache: Path, sketched: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="the same cache"):
        run_training(make_recipe(stream={"mix": [{"cache": str(cache)}]}))
    with pytest.raises(CacheError, match="the same cache"):
        run_training(make_recipe(stream={"mix": [{"cache": str(sketched)}, {"cache": str(sketched)}]}))
    tiny_tokenizer(vocabulary=280).save_pretrained(tmp_path / "teacher")
    tiny_model(vocabulary=280).save_pretrained(tmp_path / "teacher")
    other = tiny_cache(tmp_path, teacher=tmp_path / "teacher")
    with pytest.raises(CacheError, match=r"stream.mix: .* has another tokenizer"):
        run_training(make_recipe(stream={"mix": [{"cache": str(other)}]}))


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
