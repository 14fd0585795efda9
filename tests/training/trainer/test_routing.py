"""Chosen parts of the student learn from some of the terms alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig, RoutingConfig
from teachercache.errors import RecipeError
from teachercache.models.loading import load_causal_lm
from teachercache.objective import DistillationObjective, LossTerms
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.sources import train_order
from teachercache.training.job.train import run_training
from teachercache.training.trainer.layers import layer_objectives, watched
from teachercache.training.trainer.routing import ROUTING_PASSES, Routing, routed_parameters
from training.processes import ENVIRONMENT, TIMEOUT_SECONDS, TORCHRUN, compare_with_one
from training.runs import log_of
from training.trainer.routed_step import LEARNING_RATE, ROWS, take_step

from builders import tiny_model


def names_in(model: Any, **lists: Any) -> dict[str, set[str]]:
    names = {id(weights): name for name, weights in model.named_parameters()}
    routed = routed_parameters(model, RoutingConfig.model_validate(lists))
    return {routing_pass: {names[id(weights)] for weights in found} for routing_pass, found in routed.items()}


def test_blocks_modules_and_weights_are_named() -> None:
    model = tiny_model(layers=3, tied=False)
    found = names_in(model, distillation=[1, "model.layers.*.mlp.up_proj"], task=["lm_head", "*.norm.weight"])
    everything = {name for name, _ in model.named_parameters()}
    of_first = {name for name in everything if name.startswith("model.layers.0.")}
    assert found["distillation"] == of_first | {f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)}
    assert found["task"] == {"lm_head.weight", "model.norm.weight"}
    assert names_in(model, task=[0])["task"] == {"model.embed_tokens.weight"}
    assert names_in(model, task=["model"])["task"] == everything - {"lm_head.weight"}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"task": [4]}, r"routing.task: there is no block 4; the student has blocks 1 to 2, and 0 is its embeddings"),
        ({"task": ["model.layer.1"]}, r"nothing that learns matches model.layer.1; the nearest name is model.layers.1"),
        ({"task": [1], "distillation": ["*.mlp"]}, r"model.layers.0.mlp.gate_proj.weight is in both lists"),
        (
            {"task": ["lm_head"], "distillation": [0]},
            r"embed_tokens.weight and lm_head.weight are one weight, which is in",
        ),
    ],
)
def test_what_cannot_be_routed_is_refused_in_a_line(lists: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        routed_parameters(tiny_model(), RoutingConfig.model_validate(lists))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_learn_are_not_routed() -> None:
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing that learns matches 1"):
        routed_parameters(model, RoutingConfig(task=(1,)))


def test_two_turns_add_up_to_the_gradient_of_the_loss_and_to_one_of_its_terms() -> None:
    """Against gradients of two backward passes over the same model without routing."""
    config = RoutingConfig(distillation=(1,), task=("lm_head", "*.layers.1.mlp"))
    weights, plain = Weights(0.7, 2.0), tiny_model(layers=2, tied=False).train()

    def losses(model: Any) -> dict[str, torch.Tensor]:
        logits = model(input_ids=torch.arange(12)[None], use_cache=False).logits
        return {"distillation": logits.square().mean(), "task": logits.logsumexp(-1).mean()}

    expected: dict[str, dict[str, torch.Tensor]] = {}
    for routing_pass in ROUTING_PASSES:
        (losses(plain)[routing_pass] * (0.7 if routing_pass == "distillation" else 1 - 0.7)).backward()
        expected[routing_pass] = {name: each.grad.clone() for name, each in plain.named_parameters()}
        plain.zero_grad()
    routed = tiny_model(layers=2, tied=False).train()
    routing = Routing(routed, config)
    for batch in routing.presented([{}]):
        routing.routing_pass = batch["routing_pass"]
        found = losses(routed)[routing.routing_pass]
        terms = LossTerms(found, found.detach(), found.detach(), 1)
        routing.of_pass(terms, weights).total.backward()
    of = {
        name: routing_pass for routing_pass, names in names_in(plain, **config.model_dump()).items() for name in names
    }
    assert set(of.values()) == set(ROUTING_PASSES)
    for name, each in routed.named_parameters():
        routing_passes = [of[name]] if name in of else list(ROUTING_PASSES)
        twin = sum(expected[routing_pass][name] for routing_pass in routing_passes)
        assert torch.equal(each.grad, twin), name
    shared = next(name for name, _ in routed.named_parameters() if name not in of)
    assert not torch.equal(expected["task"][shared], torch.zeros_like(expected["task"][shared]))


ROUTING = {"distillation": [1], "task": ["model.layers.1.mlp", "model.norm"]}
LAYERS = [{"match": "hidden-cosine", "weight": 0.5}]
OBJECTIVE = {"alpha": 0.7, "temperature": 2.0, "layers": LAYERS, "routing": ROUTING}


def gradients(cache: Path, student: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The naive twin: of all rows of the first step at once, a backward pass for each term of the loss."""
    opened, model = Cache.open(cache), load_causal_lm(str(student), dtype="float32").train()
    config = ObjectiveConfig.model_validate(OBJECTIVE)
    objective = DistillationObjective(config, kind=opened.kind)
    [of_layers] = layer_objectives(model, config, [opened], seed=0)
    plan = BatchPlan(order=train_order(opened, [], seed=0), global_batch=ROWS, micro_batch=ROWS, world_size=1)
    columns = (*objective.columns, *of_layers.columns)
    rows = [opened.read_row("train", int(index), columns=columns) for index in plan.step_rows(0)]
    batch = Collator.of(OwnRows(opened, columns))(rows)
    labels, targets, layers = (batch.pop(name) for name in ("shift_labels", "targets", "layers"))
    found = {}
    for routing_pass in ROUTING_PASSES:
        with watched(model, of_layers) as activations:
            logits = model(**batch, use_cache=False).logits
        weights = Weights(1.0 if routing_pass == "distillation" else 0.0, 2.0)
        total = objective(StudentOutput.of_logits(logits), labels, targets, weights=weights).total
        if routing_pass == "distillation":
            weighed = of_layers.loss(activations, layers, labels, weights={"hidden-cosine": 0.5}).total
            total = 0.7 * total + weighed
        else:
            total = (1 - 0.7) * total
        model.zero_grad()
        (total / int((labels != -100).sum())).backward()
        found[routing_pass] = {
            name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in model.named_parameters()
        }
    return found


def step_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint-1" / "model.safetensors")


def check_step(cache: Path, student: Path, after: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """`other` is after a step with another task."""
    before = dict(load_causal_lm(str(student), dtype="float32").named_parameters())
    of = {
        name: routing_pass
        for routing_pass, names in names_in(load_causal_lm(str(student)), **ROUTING).items()
        for name in names
    }
    twin, seen = gradients(cache, student), set()
    for name, weights in before.items():
        routing_passes = [of[name]] if name in of else list(ROUTING_PASSES)
        expected = sum(twin[routing_pass][name] for routing_pass in routing_passes)
        found = (weights.detach() - after[name]) / LEARNING_RATE
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
        same = torch.equal(after[name], other[name])
        assert same == (of.get(name) == "distillation"), name
        seen.add(of.get(name))
    assert seen == {None, *ROUTING_PASSES}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_part_has_the_gradient_of_its_terms(
    layered: Path,
    plain_pupil: Path,
    tmp_path: Path,
    stage: int,
) -> None:
    for name in ("one", "other"):
        take_step(layered, plain_pupil, tmp_path / name, stage=stage, objective=OBJECTIVE, other_labels=name == "other")
    check_step(layered, plain_pupil, step_of(tmp_path / "one"), step_of(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_part_has_the_gradient_of_its_terms_in_two_processes(
    layered: Path,
    plain_pupil: Path,
    tmp_path: Path,
    stage: int,
) -> None:
    program = str(Path(__file__).with_name("routed_step.py"))
    for name, rest in (("one", []), ("other", ["other-labels"])):
        arguments = [str(layered), str(plain_pupil), str(tmp_path / name), str(stage), json.dumps(OBJECTIVE), *rest]
        done = subprocess.run(
            [*TORCHRUN, program, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False,
            timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    check_step(layered, plain_pupil, step_of(tmp_path / "one"), step_of(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_learn_what_one_learns(
    make_recipe: Any,
    layered: Path,
    plain_pupil: Path,
    tmp_path: Path,
    stage: int,
) -> None:
    """Also where one of them has nothing but padding."""
    settings = {"cache_folder": layered, "objective": OBJECTIVE, "zero_stage": stage, "micro_batch": 8}
    compare_with_one(make_recipe, plain_pupil, tmp_path, launcher=TORCHRUN, **settings)


def test_the_log_has_every_term_and_position_once(
    make_recipe: Any,
    plain_student: Path,
    tmp_path: Path,
) -> None:
    objective = {"gradient_cosines": 1, "emphasis": {"by": "student-entropy"}}
    routed = make_recipe(
        output=tmp_path / "routed", student_model=plain_student, max_steps=3,
        objective={**objective, "routing": {"task": ["*.mlp"]}},
    )  # fmt: skip
    plain = make_recipe(output=tmp_path / "plain", student_model=plain_student, max_steps=3, objective=objective)
    first = []
    for recipe in (routed, plain):
        assert run_training(recipe)["steps"] == 3
        first.append(log_of(recipe.train.output)[0])
    first[0].pop("grad_norm"), first[1].pop("grad_norm")
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    second = [log_of(recipe.train.output)[1]["loss"] for recipe in (routed, plain)]
    assert abs(second[0] - second[1]) > 1e-4


def test_a_step_in_which_a_term_has_no_weight_has_an_empty_turn(make_recipe: Any) -> None:
    alpha = {"schedule": "phases", "values": [1.0, 0.5, 0.0], "at": [0.3, 0.6]}
    recipe = make_recipe(objective={"alpha": alpha, "routing": {"task": ["*.mlp"]}, "gradient_cosines": 1}, max_steps=3)
    run_training(recipe)
    log = [record for record in log_of(recipe.train.output) if "loss" in record]
    assert [record["alpha"] for record in log] == [1.0, 0.5, 0.0]
    assert ["cosine_kl_ce" in record for record in log] == [False, True, False]


@pytest.mark.parametrize("balance", ["ratio", "uncertainty"])
def test_balances_of_alpha_hear_the_losses_of_both_turns(
    make_recipe: Any, plain_student: Path, tmp_path: Path, balance: str
) -> None:
    """Nearly nothing is learned, so that losses are those of the run without routing."""
    settings: dict[str, Any] = {"student_model": plain_student, "learning_rate": 1e-9, "max_steps": 5}
    alpha = {"balance": balance, "window": 2}
    routed, plain = (
        make_recipe(output=tmp_path / name, objective={"alpha": alpha, **more}, **settings)
        for name, more in (("routed", {"routing": {"task": ["*.mlp"]}}), ("plain", {}))
    )
    alphas = []
    for recipe in (routed, plain):
        run_training(recipe)
        alphas.append([record["alpha"] for record in log_of(recipe.train.output) if "loss" in record])
    np.testing.assert_allclose(*alphas, rtol=1e-5)
    assert len(set(alphas[0])) > 1


def test_phases_may_have_fewer_micro_batches(make_recipe: Any, plain_student: Path, tmp_path: Path) -> None:
    """A step that is filled up with empty micro-batches has the gradient that it has without them."""
    phases = [{"name": "small", "steps": 2, "global_batch": 4}, {"name": "large", "steps": 2}]
    settings = {"student_model": plain_student, "objective": {"routing": {"task": ["*.mlp"]}}, "schedule": "constant"}
    filled = make_recipe(output=tmp_path / "filled", phases=phases, **settings)
    alone = make_recipe(output=tmp_path / "alone", global_batch=4, max_steps=2, **settings)
    run_training(filled)
    run_training(alone)
    ours, theirs = ([r for r in log_of(run.train.output) if "loss" in r] for run in (filled, alone))
    assert len(ours) == 4
    for mine, other in zip(ours[:2], theirs, strict=True):
        for name in ("loss", "kl", "ce", "positions", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), name


def test_low_rank_adapters_are_routed_by_the_names_of_their_layers(make_recipe: Any) -> None:
    recipe = make_recipe(lora={"rank": 2}, objective={"routing": {"task": [1]}}, max_steps=2)
    assert run_training(recipe)["steps"] == 2


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"alpha": 0, "routing": ROUTING}, "with this alpha nothing is left of distillation; leave routing out"),
        ({"alpha": 1.0, "routing": ROUTING}, "with this alpha nothing is left of the task; leave routing out"),
        ({"routing": {}}, "both lists are empty; name blocks or modules in one of them, or leave routing out"),
    ],
)
def test_routing_that_leaves_nothing_is_refused(make_recipe: Any, objective: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run_training(make_recipe(objective=objective))


def test_a_name_that_is_not_there_is_refused_before_the_first_step(make_recipe: Any) -> None:
    recipe = make_recipe(objective={"routing": {"task": ["model.layers.0.mpl"]}})
    with pytest.raises(RecipeError, match=r"matches model.layers.0.mpl; the nearest name is model.layers.0.mlp"):
        run_training(recipe)
    assert not list(recipe.train.output.glob("checkpoint-*"))
