"""Hard positions count more in training: however rows are batched, packed or shared out, and from where a run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import RecipeError
from teachercache.models.loading import load_causal_lm
from teachercache.objective import DistillationObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.training.job.train import run_training
from training.processes import TORCHRUN, compare_with_one
from training.runs import cut_copy, log_of, losses_of

from builders import aligned, other_student, tiny_cache

GAP = {"by": "entropy-gap", "strength": 1.5, "top": 0.5}


def entropy(log_p_V: torch.Tensor) -> float:
    p_V = log_p_V.double().exp()
    return -float(torch.where(p_V > 0, p_V * log_p_V.double(), 0.0).sum())


@pytest.mark.parametrize("by", ["student-entropy", "teacher-entropy", "entropy-gap"])
@pytest.mark.parametrize("pack", [False, True])
def test_the_loss_is_that_of_weighted_positions(cache: Path, plain_student: Path, by: str, pack: bool) -> None:
    """Against dense distributions and plain Python, row by row; inside the output layer and outside of it."""
    opened, model = Cache.open(cache), load_causal_lm(str(plain_student)).double()
    tail = "ghost" if by == "entropy-gap" else "uniform"
    settings = {"alpha": 0.7, "temperature": 2.0, "tail": tail}
    config = ObjectiveConfig.model_validate({**settings, "emphasis": {"by": by, "strength": 0.5, "top": 0.4}})
    emphasised = DistillationObjective(config, kind=opened.kind)
    plain = DistillationObjective(ObjectiveConfig.model_validate(settings), kind=opened.kind)
    rows = [opened.read_row("train", index, columns=plain.columns) for index in range(3)]
    collate = Collator.of(OwnRows(opened, plain.columns), pack=pack)
    batch = collate(rows)
    labels, targets, places = batch.pop("shift_labels"), batch.pop("targets"), batch.get("position_ids")
    found = {}
    with torch.no_grad():
        hidden = model.model(**batch, use_cache=False)[0]
        logits = model.lm_head(hidden)
        found["whole"] = emphasised(StudentOutput.of_logits(logits), labels, targets, position_ids_BS=places)
        within_layer = StudentOutput.of_hidden(hidden, model.lm_head.weight)
        found["projected"] = emphasised(within_layer, labels, targets, position_ids_BS=places)
        total, effective = 0.0, 0.0
        for row in rows:  # alone, position by position
            one = Collator.of(OwnRows(opened, plain.columns))([row])
            of_row, given = one["shift_labels"], one["targets"]
            z_NV = model(input_ids=one["input_ids"], use_cache=False).logits[of_row != -100].double()
            exact = {name: each.double() if each.is_floating_point() else each for name, each in given.items()}
            softened = opened.kind.softened(exact, 1.0, tail=tail, xp=torch)
            ours = [entropy(z_V.log_softmax(-1)) for z_V in z_NV]
            outcomes = torch.cat([softened.head_log_prob_Nk, softened.tail_log_prob_N[:, None]], 1)
            theirs = [entropy(log_p_A) for log_p_A in (outcomes if tail == "ghost" else softened.dense())]
            gaps = [max(0.0, a - b) for a, b in zip(ours, theirs, strict=True)]
            scores = {"student-entropy": ours, "teacher-entropy": theirs, "entropy-gap": gaps}[by]
            kept = sorted(range(len(scores)), key=lambda i: -scores[i])[: int(np.ceil(0.4 * len(scores)))]
            powers = np.array([scores[i] ** 0.5 if i in kept else 0.0 for i in range(len(scores))])
            weight_N = len(scores) * powers / powers.sum()
            effective += len(scores) * (weight_N.sum() ** 2 / (weight_N**2).sum()) / len(scores)
            terms = plain(
                StudentOutput.of_logits(model(input_ids=one["input_ids"], use_cache=False).logits), of_row, given,
                position_weight_N=torch.from_numpy(weight_N),
            )  # fmt: skip
            total += float(terms.total)
    for terms in found.values():
        assert float(terms.total) == pytest.approx(total, rel=1e-6)
        assert float(terms.named["emphasis_effective"]) == pytest.approx(effective, rel=1e-6)
    assert effective < 0.45 * found["whole"].positions


@pytest.mark.parametrize(
    "settings",
    [{"micro_batch": 8}, {"pack": True, "micro_batch": 4}, {"zero_stage": 3}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_what_is_learned(
    make_recipe: Any, plain_student: Path, tmp_path: Path, settings: Any
) -> None:
    shared = {"student_model": plain_student, "objective": {"emphasis": GAP}, "max_steps": 4}
    one, other = (make_recipe(output=tmp_path / name, **shared, **more) for name, more in (("a", {}), ("b", settings)))
    run_training(one)
    run_training(other)
    np.testing.assert_allclose(losses_of(other.train.output), losses_of(one.train.output), rtol=1e-5)
    shares = [
        [record["emphasis_effective"] for record in log_of(run.train.output) if "loss" in record]
        for run in (one, other)
    ]
    np.testing.assert_allclose(shares[1], shares[0], rtol=1e-5)
    assert 0.05 < shares[0][0] <= 0.55
    unweighted = make_recipe(output=tmp_path / "plain", **{**shared, "objective": {}})
    run_training(unweighted)
    assert abs(losses_of(unweighted.train.output)[0] / losses_of(one.train.output)[0] - 1) > 1e-3
    assert "emphasis_effective" not in log_of(unweighted.train.output)[0]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(make_recipe: Any, tmp_path: Path) -> None:
    """With routing and cosines besides, and dropout."""
    objective = {"emphasis": GAP, "routing": {"task": ["*.mlp"]}, "gradient_cosines": 2}
    settings = {"objective": objective, "epochs": 2, "save_every": 3, "log_every": 2, "keep_checkpoints": 9}
    whole, killed = (make_recipe(output=tmp_path / name, **settings) for name in ("whole", "killed"))
    run_training(whole)
    cut_copy(whole.train.output, killed.train.output, 6)
    assert run_training(killed)["resumed_from"] == 6
    assert log_of(killed.train.output) == log_of(whole.train.output)
    exported = [each.train.output / "student" / "model.safetensors" for each in (whole, killed)]
    assert exported[0].read_bytes() == exported[1].read_bytes()


@pytest.mark.parametrize("by", ["student-entropy", "teacher-entropy"])
def test_the_task_alone_can_be_emphasised_too(make_recipe: Any, by: str) -> None:
    recipe = make_recipe(objective={"alpha": 0.0, "emphasis": {"by": by, "top": 0.5}}, max_steps=3)
    run_training(recipe)
    assert log_of(recipe.train.output)[0]["emphasis_effective"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_learn_what_one_learns(make_recipe: Any, student: Path, tmp_path: Path, stage: int) -> None:
    objective = {"emphasis": GAP, "gradient_cosines": 1}
    compare_with_one(
        make_recipe, student, tmp_path, launcher=TORCHRUN, zero_stage=stage, micro_batch=8, objective=objective
    )


def test_a_student_with_another_tokenizer_is_refused(make_recipe: Any, tmp_path: Path) -> None:
    made, student = tiny_cache(tmp_path / "made"), other_student(tmp_path / "student")
    aligned(made, student)
    recipe = make_recipe(cache_folder=made, student_model=student, objective={"emphasis": GAP, "temperature": 1.0})
    with pytest.raises(
        RecipeError, match="objective.emphasis weighs single tokens.*leave it out, or use a student with"
    ):
        run_training(recipe)


@pytest.mark.parametrize(
    ("emphasis", "message"),
    [
        ({"by": "entropy"}, "emphasis.by"),
        ({"by": "entropy-gap", "strength": -1}, "emphasis.strength"),
        ({"by": "entropy-gap", "top": 0}, "emphasis.top"),
        ({"by": "entropy-gap", "strength": 0}, "strength 0 without a top share emphasises nothing; leave emphasis out"),
        ({"by": "entropy-gap", "share": 0.2}, "unknown key `objective.emphasis.share`"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make_recipe: Any, emphasis: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(objective={"emphasis": emphasis})
