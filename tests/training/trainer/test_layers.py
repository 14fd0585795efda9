"""Students learn from the teacher's layers: from a cache alone, exactly resumable, and nothing of it is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheError, ModelError, RecipeError
from teachercache.models.loading import load_causal_lm
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.training.job.train import run_training
from teachercache.training.trainer.layers import layer_objectives, watched
from training.layered import LAYERED_TARGETS, TERMS
from training.processes import TORCHRUN, compare_with_one
from training.runs import cut_copy, kill_after, log_of, losses_of, start_job

from builders import sentences, tiny_cache, tiny_teacher

OBJECTIVE = {"layers": TERMS}


@pytest.fixture
def make(make_recipe: Any, layered: Path, pupil: Path) -> Any:
    def made(**settings: Any) -> Any:
        shared = {"cache_folder": layered, "student_model": pupil, "objective": OBJECTIVE, "micro_batch": 4}
        settings = {**shared, **settings}
        return make_recipe(**settings)

    return made


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_layers_come_to_resemble_the_teachers(make: Any, stage: int) -> None:
    recipe = make(zero_stage=stage, epochs=8, evaluate_every=100, max_grad_norm=100.0)
    run_training(recipe)
    log = [record for record in log_of(recipe.train.output) if "loss" in record]
    names = [
        "hidden-cosine", "hidden-mse", "attention-kl", "attention-mse", "value-relations", "query-relations", "distances",
        "angles", "sample-distances", "channel-correlation",
    ]  # fmt: skip
    for name in names:
        assert log[-1][f"weight_{name}"] > 0
        assert np.isfinite(log[-1][name])
    for name in ("hidden-cosine", "hidden-mse", "attention-kl", "channel-correlation"):
        first, last = (np.mean([record[name] for record in part]) for part in (log[:4], log[-4:]))
        assert last < 0.9 * first, name
    for layer in (1, 2):
        assert log[-1][f"similarity_{layer}"] > log[0][f"similarity_{layer}"] + 0.1


def test_the_loss_is_the_weighted_sum_of_its_terms(make: Any) -> None:
    recipe = make(max_steps=3)
    run_training(recipe)
    weights = {"hidden-cosine": 0.5, "hidden-mse": 0.1, "channel-correlation": 10.0}
    for record in (record for record in log_of(recipe.train.output) if "loss" in record):
        names = [name.removeprefix("weight_") for name in record if name.startswith("weight_")]
        assert len(names) == len(TERMS)
        layers = sum(weights.get(name, 1.0) * record[name] for name in names)
        assert record["loss"] == pytest.approx(0.7 * 4 * record["kl"] + 0.3 * record["ce"] + layers, rel=1e-5)


def test_what_is_exported_is_the_student_alone(make: Any, pupil: Path) -> None:
    recipe = make(max_steps=4, evaluate_every=2)
    result = run_training(recipe)
    exported, before = load_causal_lm(result["student"]), load_causal_lm(str(pupil))
    assert {name for name, _ in exported.named_parameters()} == {name for name, _ in before.named_parameters()}
    for path in Path(result["student"]).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert not [name for name in file.keys() if "distillation" in name]  # noqa: SIM118
    kept = recipe.train.output / "checkpoint-4" / "model.safetensors"
    with safe_open(kept, framework="pt") as file:
        assert [name for name in file.keys() if name.startswith("distillation.0.terms.0.adapters")]  # noqa: SIM118


@pytest.mark.parametrize("stage", [1, 3])
def test_one_adapter_may_serve_all_layers(make: Any, pupil: Path, stage: int) -> None:
    terms = [{"match": "hidden-cosine", "adapter": "shared"}]
    recipe = make(objective={"layers": terms}, zero_stage=stage, epochs=3, evaluate_every=100)
    result = run_training(recipe)
    log = [record for record in log_of(recipe.train.output) if "loss" in record]
    assert log[-1]["hidden-cosine"] < 0.9 * log[0]["hidden-cosine"]
    with safe_open(recipe.train.output / "checkpoint-18" / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("distillation")]  # noqa: SIM118
    adapter = "distillation.0.terms.0.adapters.0"
    assert names == [f"{adapter}.{of}" for of in ("linear.bias", "linear.weight", "norm.bias", "norm.weight")]
    kept = {name for name, _ in load_causal_lm(result["student"]).named_parameters()}
    assert kept == {name for name, _ in load_causal_lm(str(pupil)).named_parameters()}


@pytest.mark.parametrize(
    "own",
    [
        pytest.param({}, id="whole"),
        pytest.param({"lora": {"rank": 4}}, id="low-rank", marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(make: Any, tmp_path: Path, own: Any) -> None:
    """Adapters and their optimizer included; the slow ones die by a signal."""
    settings = {"epochs": 3, "save_every": 3, "evaluate_every": 100, "keep_checkpoints": 9, **own}
    whole, killed = (make(output=tmp_path / name, **settings) for name in ("whole", "killed"))
    run_training(whole)
    if own:
        kill_after(start_job(killed, tmp_path), killed.train.output, 6)
    else:
        cut_copy(whole.train.output, killed.train.output, 6)
    assert run_training(killed)["resumed_from"] >= 6
    assert log_of(killed.train.output) == log_of(whole.train.output)


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"pack": True}, {"zero_stage": 3}, {"loader_workers": 2}], ids=str
)
def test_how_a_step_is_computed_does_not_change_its_loss(make: Any, plain_pupil: Path, settings: Any) -> None:
    """`sample-distances` and the drawing of positions look at sequences; packing moves rows among them."""
    terms = [term for term in TERMS if term["match"] not in ("sample-distances", "distances", "angles")]
    shared = {"student_model": plain_pupil, "objective": {"layers": terms}, "max_steps": 5}
    one = make(output=Path(str(plain_pupil)) / "one", **shared)
    other = make(output=Path(str(plain_pupil)) / f"other-{next(iter(settings))}", **shared, **settings)
    run_training(one)
    run_training(other)
    np.testing.assert_allclose(losses_of(other.train.output), losses_of(one.train.output), rtol=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_terms_in_bf16_are_those_of_float32_but_for_rounding(make: Any, plain_pupil: Path, stage: int) -> None:
    logs = {}
    for precision in ("fp32", "bf16"):
        output = Path(str(plain_pupil)) / f"{precision}-{stage}"
        recipe = make(output=output, student_model=plain_pupil, precision=precision, zero_stage=stage, max_steps=8)
        run_training(recipe)
        logs[precision] = [record for record in log_of(recipe.train.output) if "loss" in record]
    for step, (ours, exact) in enumerate(zip(logs["bf16"], logs["fp32"], strict=True)):
        for name in (name.removeprefix("weight_") for name in exact if name.startswith("weight_")):
            # Between the few rows of a micro-batch, what rounding did to the steps before shows most.
            most = 0.01 if step == 0 else 0.1 if name == "sample-distances" else 0.03
            assert ours[name] == pytest.approx(exact[name], rel=most), (name, step)
        assert ours["similarity_1"] == pytest.approx(exact["similarity_1"], abs=0.02)


def test_low_rank_adapters_learn_from_layers_too(make: Any, pupil: Path) -> None:
    recipe = make(lora={"rank": 4}, epochs=3, evaluate_every=100)
    result = run_training(recipe)
    log = [record for record in log_of(recipe.train.output) if "loss" in record]
    assert log[-1]["hidden-cosine"] < log[0]["hidden-cosine"]
    exported = load_causal_lm(result["student"])
    assert {name for name, _ in exported.named_parameters()} == {
        name for name, _ in load_causal_lm(str(pupil)).named_parameters()
    }


def test_only_the_columns_of_the_terms_are_read(layered: Path, pupil: Path) -> None:
    cache, model = Cache.open(layered), load_causal_lm(str(pupil))
    config = ObjectiveConfig.model_validate({"layers": [{"match": "hidden-cosine", "pairs": {2: 4}}]})
    [objective] = layer_objectives(model, config, [cache], seed=0)
    assert objective.columns == ("hidden_4",) and objective.hidden_layers == (2,)
    assert cache.read_row("train", 0, columns=objective.columns).targets.keys() == {"hidden_4"}


def test_a_row_that_is_packed_or_padded_has_the_terms_that_it_has_alone(layered: Path, plain_pupil: Path) -> None:
    cache, model = Cache.open(layered), load_causal_lm(str(plain_pupil))
    terms = [
        term for term in TERMS if term["match"].startswith(("hidden", "attention")) or "relations" in term["match"]
    ]
    config = ObjectiveConfig.model_validate({"layers": terms})
    [objective] = layer_objectives(model, config, [cache], seed=0)
    rows = [cache.read_row("train", index, columns=objective.columns) for index in range(5)]

    def sums(chosen: list[Any], *, pack: bool = False) -> torch.Tensor:
        batch = Collator.of(OwnRows(cache, objective.columns), pack=pack)(chosen)
        labels, layers, _ = batch.pop("shift_labels"), batch.pop("layers"), batch.pop("targets")
        with torch.no_grad(), watched(model, objective) as activations:
            model(**batch, use_cache=False)
            weights = dict.fromkeys(objective.names, 1.0)
            return torch.stack([*objective.loss(activations, layers, labels, weights=weights).terms.values()])

    alone = torch.stack([sums([row]) for row in rows]).sum(0)
    torch.testing.assert_close(sums(rows), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums(rows, pack=True), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"match": "hidden-cosine", "pairs": {5: 4}}, "with the student's 5, but the student has 2 blocks"),
        ({"match": "hidden-cosine", "pairs": {1: 1}}, "layer 1 of the teacher, which is not stored"),
        ({"match": "hidden-cosine", "pairs": "first"}, "layer 3 of the teacher with the student's 3"),
        (
            {"match": "query-relations", "relation_heads": 5},
            "relation_heads is 5, which does not divide the 32 channels",
        ),
    ],
)
def test_terms_that_do_not_fit_are_refused_before_the_first_step(make: Any, term: Any, message: str) -> None:
    recipe = make(objective={"layers": [term]})
    with pytest.raises(CacheError, match=message) as caught:
        run_training(recipe)
    assert "\n" not in str(caught.value) and not list(recipe.train.output.glob("checkpoint-*"))


def test_rows_of_a_micro_batch_that_are_too_few_are_refused(make: Any) -> None:
    with pytest.raises(RecipeError, match="sample-distances compares .* which has 2; set train.micro_batch to 3"):
        run_training(make(objective={"layers": [{"match": "sample-distances"}]}, micro_batch=2))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"match": "hidden-cosine", "pairs": {}}, "pairs"),
        ({"match": "hidden-cosine", "heads": "mix"}, "heads means nothing to hidden-cosine"),
        ({"match": "hidden-mse", "first_key": False}, "first_key means nothing to hidden-mse"),
        ({"match": "attention-kl", "relation_heads": 2}, "relation_heads means nothing to attention-kl"),
        ({"match": "attention-kl", "adapter": "shared"}, "adapter means nothing to attention-kl"),
        ({"match": "attention-kl", "centred": False}, "centred means nothing to attention-kl"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, term: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(objective={"layers": [term]})


def test_reentrant_checkpointing_is_refused(layered: Path, pupil: Path) -> None:
    cache, model = Cache.open(layered), load_causal_lm(str(pupil)).train()
    config = ObjectiveConfig.model_validate({"layers": [{"match": "attention-kl"}]})
    [objective] = layer_objectives(model, config, [cache], seed=0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    batch = Collator.of(OwnRows(cache, objective.columns))([cache.read_row("train", 0, columns=objective.columns)])
    with watched(model, objective) as activations, pytest.raises(ModelError, match="must not be reentrant"):
        model(input_ids=batch["input_ids"], use_cache=False)
        objective.loss(activations, batch["layers"], batch["shift_labels"], weights=dict.fromkeys(objective.names, 1.0))


def test_a_cache_without_layers_is_refused_with_the_remedy(make: Any, cache: Path) -> None:
    with pytest.raises(
        CacheError, match=r"match hidden states, but the cache stores none; precompute it with targets.hidden"
    ):
        run_training(make(cache_folder=cache))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_learn_what_one_learns(make: Any, plain_pupil: Path, tmp_path: Path, stage: int) -> None:
    """Also where one of them has nothing but padding. Terms with one value a micro-batch are left out: they see other ones."""
    terms = [
        term for term in TERMS if term["match"].startswith(("hidden", "attention")) or "relations" in term["match"]
    ]
    settings = {"objective": {"layers": terms}, "zero_stage": stage, "micro_batch": 8}
    compare_with_one(make, plain_pupil, tmp_path, launcher=TORCHRUN, **settings)


@pytest.fixture
def two_caches(tmp_path: Path) -> dict[str, Any]:
    """Settings of a mix: a micro-batch is of one cache, so that the adapters of the other one idle."""
    teacher = tiny_teacher(tmp_path / "teacher", layers=4, hidden=64, seed=3)
    other = tiny_cache(tmp_path / "other", teacher=teacher, texts=sentences(40, seed=7), targets=LAYERED_TARGETS)
    terms = [term for term in TERMS if term["match"].startswith(("hidden", "attention"))]
    return {"objective": {"layers": terms}, "stream": {"mix": [{"cache": str(other), "share": 0.4}]}}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_student_learns_from_the_layers_of_two_caches(make: Any, two_caches: dict[str, Any], stage: int) -> None:
    recipe = make(zero_stage=stage, epochs=3, evaluate_every=100, **two_caches)
    run_training(recipe)
    log = [record for record in log_of(recipe.train.output) if "loss" in record]
    assert log[-1]["hidden-cosine"] < log[0]["hidden-cosine"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_learn_from_two_caches(
    make: Any, two_caches: dict[str, Any], plain_pupil: Path, tmp_path: Path, stage: int
) -> None:
    """Each process at another cache at times of its own."""
    compare_with_one(make, plain_pupil, tmp_path, launcher=TORCHRUN, zero_stage=stage, micro_batch=8, **two_caches)


@pytest.mark.slow
def test_terms_with_one_value_a_micro_batch_go_without_a_share(make: Any, plain_pupil: Path, tmp_path: Path) -> None:
    """One process has all the rows, the other nothing but padding, under ZeRO 3."""
    terms = [{"match": match} for match in ("distances", "angles", "sample-distances", "channel-correlation")]
    compare_with_one(
        make, plain_pupil, tmp_path, launcher=TORCHRUN, zero_stage=3, micro_batch=8, objective={"layers": terms}
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_goes_on_with_another_number_of_processes(
    make: Any, plain_pupil: Path, tmp_path: Path, stage: int
) -> None:
    terms = [term for term in TERMS if term["match"].startswith(("hidden", "attention"))]
    settings = {
        "student_model": plain_pupil,
        "objective": {"layers": terms},
        "zero_stage": stage,
        "epochs": 3,
        "save_every": 3,
    }
    whole, changed = (make(output=tmp_path / name, evaluate_every=100, **settings) for name in ("whole", "changed"))
    assert start_job(whole, tmp_path, processes=1).wait() == 0
    kill_after(start_job(changed, tmp_path, processes=2), changed.train.output, 6)
    assert run_training(changed)["resumed_from"] >= 6
    assert losses_of(changed.train.output) == pytest.approx(losses_of(whole.train.output), abs=1e-4)
