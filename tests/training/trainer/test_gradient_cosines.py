"""Cosines between gradients of terms, against gradients that autograd takes one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from objective.seeded import leaves, teacher
from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import RecipeError
from teachercache.models.loading import load_causal_lm
from teachercache.objective import LossTerms
from teachercache.objective.layers.gradient_taps import VECTORS
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.projected import projected_sums
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.training.job.train import run_training
from teachercache.training.trainer.gradient_cosines import GradientCosines
from teachercache.training.trainer.layers import layer_objectives, watched
from training.layered import TERMS
from training.processes import TORCHRUN, compare_with_one
from training.runs import log_of

from builders import aligned, other_student, scaled_student, tiny_cache

V = 40


def cosines(names: tuple[str, ...] = (), *, every: int = 1) -> GradientCosines:
    return GradientCosines(Accelerator(cpu=True), every=every, first="kl", terms=names)


def test_divergence_and_cross_entropy_are_compared_at_what_enters_the_output_layer() -> None:
    hidden, weight, _ = leaves(bias=False)
    labels, weights, softened = torch.arange(len(hidden)) % V, Weights(0.7, 2.0), teacher("sketch")

    def loss(part: slice) -> Any:
        def of(output: StudentOutput, weights: Weights) -> LossTerms:
            assert output.layer is not None and not output.layer.weight_LD.requires_grad
            sums = projected_sums(
                output.values_BSA, output.layer.weight_LD, None, labels_N=labels[part], teacher=softened.at(part),
                weights=weights, vocabulary_size=V,
            )  # fmt: skip
            return LossTerms(*sums, positions=len(output.values_BSA))

        return of

    measured = cosines()
    with torch.no_grad():  # as inside a forward pass that nothing is recorded of
        for part in (slice(0, 9), slice(9, None)):  # two micro-batches
            measured.add(loss(part), StudentOutput.of_hidden(hidden[part], weight), weights)
    found = measured.take()

    logits = hidden @ weight.T  # of more columns than tokens
    p = softened.dense(slice(None)).exp()
    kl = (p * (p.log() - (logits / 2).log_softmax(-1)[:, :V])).sum() * 4 * 0.7
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") * 0.3
    [of_kl] = torch.autograd.grad(kl, hidden, retain_graph=True)
    [of_ce] = torch.autograd.grad(ce, hidden)
    assert found["cosine_kl_ce"] == pytest.approx(float(cosine_similarity(of_kl.flatten(), of_ce.flatten(), dim=0)))
    assert found["gradient_kl"] == pytest.approx(float(of_kl.norm()) / math.sqrt(len(hidden)))
    assert found["gradient_ce"] == pytest.approx(float(of_ce.norm()) / math.sqrt(len(hidden)))
    assert measured.take() == {}


def test_a_term_without_weight_has_no_cosine() -> None:
    measured = cosines()
    measured.add(lambda *_: pytest.fail("computed"), StudentOutput.of_logits(torch.zeros(2, 3)), Weights(0.0, 1.0))
    assert measured.take() == {}


def test_every_nth_step_is_measured() -> None:
    measured, labels = cosines(every=3), torch.zeros(1, 4, dtype=torch.int64)
    assert [step for step in range(7) if measured.taps_at(step, labels)] == [2, 5]


NAMES = [
    "hidden-cosine", "hidden-mse", "attention-kl", "attention-mse", "value-relations", "query-relations", "distances",
    "angles", "sample-distances", "channel-correlation",
]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_terms_between_layers_are_compared_with_what_comes_from_above(
    layered: Path,
    pupil: Path,
    checkpointing: bool,
) -> None:
    """The twin differentiates every term, and the whole loss, with respect to what was recorded."""
    cache, model = Cache.open(layered), load_causal_lm(str(pupil)).eval()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.config.attention_dropout = 0.0
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    config = ObjectiveConfig.model_validate({"layers": TERMS})
    [objective] = layer_objectives(model, config, [cache], seed=0)
    rows = [cache.read_row("train", index, columns=objective.columns) for index in range(4)]
    batch = Collator.of(OwnRows(cache, objective.columns))(rows)
    labels, layers, _ = batch.pop("shift_labels"), batch.pop("layers"), batch.pop("targets")

    weights = {term.match: float(term.weight) for term in config.layers}
    measured = cosines(objective.names)
    taps = measured.taps_at(0, labels)
    with watched(model, objective, apart=True) as activations:
        logits = model(**batch, use_cache=False).logits
    found = objective.loss(activations, layers, labels, weights=weights, taps=taps)
    total = logits.logsumexp(-1).sum() + found.total
    taps.scaled_by(total)
    (total * 0.125).backward()  # as training divides by positions, and DeepSpeed multiplies by a loss scale
    figures = measured.take()

    with watched(model, objective) as activations:
        logits = model(**batch, use_cache=False).logits
    twin = objective.loss(activations, layers, labels, weights=weights)
    assert torch.equal(twin.total, found.total)
    assert all(torch.equal(twin.terms[name], found.terms[name]) for name in NAMES)
    assert twin.similarity == found.similarity

    def gradients(value: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        given = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(given, tensors, strict=True)]

    places = {("hidden", layer, 0): tensor for layer, tensor in activations.hidden.items()}
    for layer, heads in activations.attention.items():
        places |= {("attention", layer, i): getattr(heads, vector) for i, vector in enumerate(VECTORS)}
    everything = logits.logsumexp(-1).sum() + twin.total
    arriving = dict(zip(places, gradients(everything, list(places.values())), strict=True))
    own = {name: _own_gradients(objective, activations, layers, labels, name, weights) for name in NAMES}
    above = {place: arriving[place] - sum(own[name].get(place, 0.0) for name in NAMES) for place in places}
    for name in NAMES:
        mine = torch.cat([gradient.flatten() for gradient in own[name].values()])
        others = torch.cat([above[place].flatten() for place in own[name]])
        expected = float(cosine_similarity(mine.double(), others.double(), dim=0))
        assert figures[f"cosine_{name}_above"] == pytest.approx(expected, abs=2e-4), name
        per_position = math.sqrt(int((labels != -100).sum()))
        assert figures[f"gradient_{name}"] == pytest.approx(float(mine.norm()) / per_position, rel=1e-3)
        assert figures[f"gradient_above_{name}"] == pytest.approx(float(others.norm()) / per_position, rel=1e-3)


def _own_gradients(
    objective: Any, activations: Any, layers: Any, labels: Any, name: str, weights: dict[str, float]
) -> dict[Any, torch.Tensor]:
    """Gradients of one term alone, with respect to what was recorded, as if that had come from nowhere."""
    leaf = replace(
        activations,
        hidden={layer: tensor.detach().requires_grad_() for layer, tensor in activations.hidden.items()},
        attention={
            layer: replace(heads, **{v: getattr(heads, v).detach().requires_grad_() for v in VECTORS})
            for layer, heads in activations.attention.items()
        },
    )
    alone = {other: weight if other == name else 0.0 for other, weight in weights.items()}
    objective.loss(leaf, layers, labels, weights=alone).total.backward()
    found = {("hidden", layer, 0): tensor.grad for layer, tensor in leaf.hidden.items()}
    for layer, heads in leaf.attention.items():
        found |= {("attention", layer, i): getattr(heads, v).grad for i, v in enumerate(VECTORS)}
    return {place: gradient for place, gradient in found.items() if gradient is not None and gradient.any()}


LAYERS = [
    {"match": "hidden-cosine", "weight": 0.5},
    {"match": "attention-kl"},
    {"match": "hidden-mse", "pairs": {2: 4}},
]
MEASURED = {"layers": LAYERS, "gradient_cosines": 2}


def measured_of(run: Path) -> list[dict[str, Any]]:
    """Cosines in the log of a run, by record that has any."""
    records = [
        {name: each for name, each in record.items() if name.startswith(("cosine_", "gradient_"))}
        for record in log_of(run)
        if "loss" in record
    ]
    return [record for record in records if record]


@pytest.fixture
def make(make_recipe: Any, layered: Path, plain_pupil: Path) -> Any:
    def made(**settings: Any) -> Any:
        shared = {"cache_folder": layered, "student_model": plain_pupil, "objective": MEASURED, "max_steps": 4}
        return make_recipe(**{**shared, **settings})

    return made


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 8},
        {"zero_stage": 0},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"pack": True, "micro_batch": 4},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_they_are_those_of_the_global_batch(make: Any, tmp_path: Path, settings: Any) -> None:
    one, other = (make(output=tmp_path / name, **more) for name, more in (("one", {}), ("other", settings)))
    run_training(one)
    run_training(other)
    expected, found = measured_of(one.train.output), measured_of(other.train.output)
    assert len(expected) == 2  # of four steps
    terms = {"hidden-cosine", "attention-kl", "hidden-mse"}
    assert set(expected[0]) == {
        "cosine_kl_ce", "gradient_kl", "gradient_ce", *(f"cosine_{term}_above" for term in terms),
        *(f"gradient_{term}" for term in terms), *(f"gradient_above_{term}" for term in terms),
    }  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_measuring_changes_nothing_of_what_is_learned(make: Any, pupil: Path, tmp_path: Path) -> None:
    """With dropout: nothing is drawn at random. Gradients add up in another order, which shows in the last bit."""
    settings: dict[str, Any] = {"student_model": pupil}
    plain = make(output=tmp_path / "plain", objective={"layers": LAYERS}, **settings)
    measured = make(output=tmp_path / "measured", **settings)
    weights = [load_file(Path(run_training(recipe)["student"], "model.safetensors")) for recipe in (plain, measured)]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=0.0, atol=1e-5)
    assert not measured_of(plain.train.output)


def test_a_run_may_go_on_with_or_without_measuring(make: Any) -> None:
    first = run_training(make())
    assert run_training(make(objective={"layers": LAYERS})) == first
    with pytest.raises(RecipeError, match="objective.routing was null, now"):
        run_training(make(objective={"layers": LAYERS, "routing": {"task": [1]}}))


def test_a_term_alone_has_nothing_to_be_compared_with(make_recipe: Any) -> None:
    with pytest.raises(
        RecipeError, match="gradient_cosines compares terms, and with this alpha nothing is left of the task"
    ):
        run_training(make_recipe(objective={"alpha": 1, "gradient_cosines": 5}))


def test_students_with_another_tokenizer_are_measured_too(make_recipe: Any, tmp_path: Path) -> None:
    made, student = tiny_cache(tmp_path / "made"), other_student(tmp_path / "student")
    aligned(made, student)
    objective = {"gradient_cosines": 1, "temperature": 1.0}
    recipe = make_recipe(cache_folder=made, student_model=student, objective=objective, max_steps=2)
    run_training(recipe)
    for record in measured_of(recipe.train.output):
        assert set(record) == {"cosine_across_ce", "gradient_across", "gradient_ce"}
        assert -1 <= record["cosine_across_ce"] <= 1


def test_a_loss_that_is_formed_outside_is_measured_at_the_logits(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(
        student_model=scaled_student(tmp_path / "scaled"), objective={"gradient_cosines": 1}, max_steps=1
    )
    run_training(recipe)
    [record] = measured_of(recipe.train.output)
    assert -1 <= record["cosine_kl_ce"] <= 1 and record["gradient_kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_measure_what_one_measures(
    make: Any,
    plain_pupil: Path,
    tmp_path: Path,
    stage: int,
) -> None:
    compare_with_one(make, plain_pupil, tmp_path, launcher=TORCHRUN, zero_stage=stage, micro_batch=8)
    assert measured_of(tmp_path / "two")
