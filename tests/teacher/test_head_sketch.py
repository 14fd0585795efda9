"""Kind head+sketch from real (tiny) models: calibration, capture, reading, and the models that it must know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacher.output_layers import MODELS, V, observe
from teachercache.cache import Cache
from teachercache.cache.verify import verify
from teachercache.config import parse_recipe
from teachercache.errors import CacheError, ModelError, RecipeError
from teachercache.targets import HeadSketch, SketchBasis, target_kind
from teachercache.teacher.calibration import calibrate
from teachercache.teacher.fidelity import kl_divergence
from teachercache.teacher.output_layer import OutputLayer
from teachercache.teacher.sketch_choice import STEPS, Trial, candidate_ranks, held_apart

from builders import sentences, tiny_cache, tiny_model, tiny_teacher

SETTINGS = {"kind": "head+sketch", "k": 6, "rank": 24, "step": 0.05, "calibration_positions": 600}


def stored_arrays(kind: HeadSketch, logits: torch.Tensor, hidden: torch.Tensor) -> dict[str, np.ndarray]:
    captured = kind.capture(torch, logits.clone(), torch.arange(len(logits)), hidden)
    assert kind.is_usable(captured).all()
    finished = kind.finish(captured)
    read = {}
    for column in kind.columns:
        tables, (page,) = column.encode([finished[column.name]])
        read[column.name] = column.decoder(tables)(page, len(logits))
        np.testing.assert_array_equal(read[column.name], finished[column.name])
    return kind.decoded(read)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 2.5, 6.0])
def test_every_output_layer_is_rebuilt(name: str, temperature: float) -> None:
    model = MODELS[name]()
    layer = OutputLayer.of(model, vocabulary_size=V)
    hidden, logits = observe(model)
    torch.testing.assert_close(layer.logits(hidden[0]), logits[0], atol=2e-3, rtol=1e-3)
    kind = calibrate(HeadSketch(6, 32, 0.01, V, 600), layer, hidden)
    fresh_hidden, fresh_logits = observe(model, rows=2, seed=9)
    arrays = stored_arrays(kind, fresh_logits[0], fresh_hidden[0])
    dense = torch.from_numpy(kind.softened(arrays, temperature).dense())
    divergence = kl_divergence(fresh_logits[0] / temperature, dense).mean()
    assert divergence < 2e-3  # full rank and a fine step leave rounding alone


@pytest.mark.parametrize("temperature", [1.0, 1.3, 4.0])
def test_head_mass_and_actual_token_are_right_whatever_the_sketch(temperature: float) -> None:
    model = tiny_model(vocabulary=V)
    hidden, logits = observe(model)
    kind = calibrate(HeadSketch(6, 4, 1.0, V, 600), OutputLayer.of(model, vocabulary_size=V), hidden)
    arrays = stored_arrays(kind, logits[0], hidden[0])
    softened = kind.softened(arrays, temperature)
    exact = torch.log_softmax(logits[0].double() / temperature, -1)
    ids = torch.from_numpy(softened.head_ids_Nk).long()
    assert (ids == logits[0].topk(6).indices).all()
    np.testing.assert_allclose(softened.head_log_prob_Nk, exact.gather(1, ids).numpy(), atol=0.04)  # steps of 1/32
    np.testing.assert_allclose(np.exp(softened.dense()).sum(-1), 1, atol=1e-5)
    labels = torch.arange(len(logits[0]))
    actual = torch.log_softmax(logits[0].double(), -1).gather(1, labels[:, None])[:, 0]
    np.testing.assert_allclose(np.sqrt(-arrays["actual_log_prob"]), np.sqrt(-actual.numpy()), atol=1 / 128 + 1e-4)


def test_finer_steps_and_more_directions_are_more_faithful() -> None:
    model = tiny_model(vocabulary=V)
    layer, (hidden, logits) = OutputLayer.of(model, vocabulary_size=V), observe(model)

    def divergence(rank: int, step: float) -> float:
        kind = calibrate(HeadSketch(6, rank, step, V, 600), layer, hidden)
        dense = torch.from_numpy(kind.softened(stored_arrays(kind, logits[1], hidden[1]), 2.0).dense())
        return float(kl_divergence(logits[1] / 2, dense).mean())

    assert divergence(32, 0.05) < divergence(32, 0.4) < divergence(4, 0.4)


def test_directions_go_to_tokens_that_have_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = list(torch.randn(14, 96, 32, generator=generator))
    likely, lively = torch.arange(V) < V // 3, torch.arange(32) >= 24
    matrix_VD = torch.randn(V, 32, generator=generator) * torch.where(likely[:, None] != lively, 0.7, 0.0)

    def divergence(unlikely: float) -> float:
        """With other tokens, that have hardly any probability and logits that vary, in channels of their own."""
        scaled_VD = torch.where(likely[:, None], matrix_VD, matrix_VD * unlikely)
        layer = OutputLayer(scaled_VD, torch.where(likely, 0.0, -60.0), 1.0, None)
        kind = calibrate(HeadSketch(6, 16, 0.05, V, 600), layer, hidden[:12])
        fresh_ND = torch.cat(hidden[12:])
        arrays = stored_arrays(kind, layer.logits(fresh_ND), fresh_ND)
        dense = torch.from_numpy(kind.softened(arrays, 2.0).dense())
        return float(kl_divergence(layer.logits(fresh_ND) / 2, dense).mean())

    assert divergence(4.0) < 1.05 * divergence(0.0)


def test_each_token_has_its_mean_probability_between_the_temperatures_of_the_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = list(torch.randn(24, 96, 32, generator=generator))
    noisy = torch.arange(V) < V // 3  # tokens whose logits the directions hardly reach
    first = torch.arange(32) < 16
    channels_D, rest_D = torch.where(first, 0.8, 0.0), torch.where(first, 0.0, 0.4)
    matrix_VD = torch.randn(V, 32, generator=generator) * torch.where(noisy[:, None], rest_D, channels_D)
    layer = OutputLayer(matrix_VD, torch.where(noisy, 0.0, 1.0), 1.0, None)
    kind = calibrate(HeadSketch(6, 16, 0.05, V, 600), layer, hidden)
    exact_V, stored_V = torch.zeros(V), torch.zeros(V)
    for hidden_ND in hidden:
        logits_NV = layer.logits(hidden_ND)
        softened = kind.softened(stored_arrays(kind, logits_NV, hidden_ND), 2.0)
        ids_Nk = torch.from_numpy(softened.head_ids_Nk).long()
        exact_V += torch.softmax(logits_NV / 2, -1).scatter(1, ids_Nk, 0.0).sum(0)
        stored_V += torch.from_numpy(softened.dense()).exp().scatter(1, ids_Nk, 0.0).sum(0)
    ratio_V = (stored_V / exact_V).log()
    assert ratio_V.square().mean().sqrt() < 0.03


def test_a_basis_is_deterministic_and_survives_its_file(tmp_path: Path) -> None:
    model = tiny_model(vocabulary=V)
    layer, (hidden, logits) = OutputLayer.of(model, vocabulary_size=V), observe(model)
    kinds = [calibrate(HeadSketch(6, 16, 0.1, V, 600), layer, hidden) for _ in range(2)]
    paths = [kind.basis.save(tmp_path) for kind in kinds * 10 if kind.basis]
    assert len(set(paths)) == 1  # named by content
    again = kinds[0].with_basis(SketchBasis.load(paths[0]))
    arrays = stored_arrays(kinds[0], logits[0], hidden[0])
    np.testing.assert_array_equal(again.softened(arrays, 2.0).dense(), kinds[0].softened(arrays, 2.0).dense())


def sketch(**logits: Any) -> HeadSketch:
    """The kind that a recipe's settings give."""
    recipe = parse_recipe({"cache": "unused", "targets": {"logits": {"k": 6, **logits}}}, origin="tests")
    kind = target_kind(recipe.targets.logits.model_dump(), vocabulary_size=V)
    assert isinstance(kind, HeadSketch)
    return kind


def test_rank_and_step_are_the_cheapest_that_meet_a_target() -> None:
    model = tiny_model(vocabulary=V)
    layer, (hidden, _) = OutputLayer.of(model, vocabulary_size=V), observe(model, rows=3)
    kind = calibrate(sketch(target_kl=0.02), layer, hidden)
    assert isinstance(kind, HeadSketch) and kind.basis is not None and kind.basis.chosen is not None
    record = kind.basis.chosen
    assert (record["rank"], record["step"]) == (kind.rank, kind.step) == (kind.basis.rank, kind.basis.step)
    measured, others = held_apart(hidden)
    everything = calibrate(sketch(rank=32, step=STEPS[-1]), layer, others)
    assert isinstance(everything, HeadSketch) and everything.basis is not None
    unbiased = replace(everything.basis, bias_constant_V=np.zeros(V, "<f2"), bias_slope_V=np.zeros(V, "<f2"))
    trial = Trial(sketch(target_kl=0.02), unbiased, layer, hidden, measured)
    ranks = candidate_ranks(sketch(target_kl=0.02), width=32, positions=2 * 48)
    every = [trial(rank, step) for rank in ranks for step in STEPS]
    meeting = [tried for tried in every if tried.kl <= 0.02]
    assert len(meeting) < len(every)
    best = min(meeting, key=lambda tried: tried.sketch_bytes)
    assert (best.rank, best.step) == (kind.rank, kind.step)
    assert len(record["tried"]) < len(every) / 3


def test_a_target_is_met_on_rows_that_calibration_did_not_see() -> None:
    model = tiny_model(vocabulary=V)
    layer, (hidden, _) = OutputLayer.of(model, vocabulary_size=V), observe(model, rows=12)
    kind = calibrate(sketch(target_kl=0.05), layer, hidden)
    fresh_hidden, fresh_logits = observe(model, rows=12, seed=9)
    for temperature in (1.0, 2.0):
        total = 0.0
        for hidden_ND, logits_NV in zip(fresh_hidden, fresh_logits, strict=True):
            dense = torch.from_numpy(kind.softened(stored_arrays(kind, logits_NV, hidden_ND), temperature).dense())
            total += float(kl_divergence(logits_NV / temperature, dense).mean()) / len(fresh_hidden)
        assert total < 0.06


@pytest.mark.parametrize(
    ("given", "chosen"), [({"rank": 24}, ["step"]), ({"step": 0.1}, ["rank"]), ({}, ["rank", "step"])]
)
def test_what_is_given_beside_a_target_stays(tmp_path: Path, given: dict[str, Any], chosen: list[str]) -> None:
    logits = {"kind": "head+sketch", "k": 6, "target_kl": 0.1, "calibration_positions": 600, **given}
    folder = tiny_cache(tmp_path, texts=sentences(60), targets={"logits": logits})
    assert verify(folder) == []
    cache = Cache.open(folder)
    kind, manifest = cache.kind, cache.manifest
    assert isinstance(kind, HeadSketch) and kind.basis is not None
    for name in ("rank", "step"):
        assert manifest.logits[name] == (None if name in chosen else given[name])
        assert getattr(kind, name) == given.get(name, manifest.calibration["chosen"][name])
    record = manifest.calibration["chosen"]
    assert record["target_kl"] == 0.1 >= record["kl"] > 0.005 and record in [kind.basis.chosen]
    assert {"rank", "step", "sketch_bytes", "kl"} == set(record["tried"][0])
    assert manifest.fidelity["kl"]["1"] < 0.15
    read = cache.read_row("train", 0)
    assert kind.decoded(read.targets)["coefficients"].shape == (read.row.positions, kind.rank)


def test_estimated_bytes_are_near_those_on_disk() -> None:
    model = tiny_model(vocabulary=V)
    layer, (hidden, logits) = OutputLayer.of(model, vocabulary_size=V), observe(model, rows=16, length=240)
    kind = calibrate(sketch(target_kl=0.05), layer, hidden)
    assert isinstance(kind, HeadSketch) and kind.basis is not None and kind.basis.chosen is not None
    rows = []
    for hidden_ND, logits_NV in zip(hidden, logits, strict=True):
        rows.append(kind.finish(kind.capture(torch, logits_NV.clone(), torch.arange(len(logits_NV)), hidden_ND)))
    columns = [column for column in kind.columns if column.name.startswith("sketch_")]
    pages = [column.encode([row[column.name] for row in rows])[1] for column in columns]
    on_disk = sum(len(page) for column in pages for page in column) / (16 * 240)
    assert 0.85 * on_disk < kind.basis.chosen["sketch_bytes"] < 1.02 * on_disk


def test_a_target_that_cannot_be_met_says_what_can() -> None:
    model = tiny_model(vocabulary=V)
    layer, (hidden, _) = OutputLayer.of(model, vocabulary_size=V), observe(model)
    with pytest.raises(
        ModelError, match=r"target_kl is 1e-05, but even a step of 0.02 leaves .* rank = 4; raise rank or k"
    ):
        calibrate(sketch(rank=4, target_kl=1e-5), layer, hidden)
    with pytest.raises(ModelError, match=r"a step of 0.02 leaves .* rank = 32; raise k, or the target"):
        calibrate(sketch(target_kl=1e-9), layer, hidden)
    with pytest.raises(ModelError, match=r"a step of 0.5 leaves .* rank = 4; raise rank or k"):
        calibrate(sketch(rank=4, step=0.5, target_kl=1e-5), layer, hidden)
    with pytest.raises(RecipeError, match="need values, or a target_kl"):
        sketch(rank=None)


def test_a_model_that_is_more_than_its_output_layer_is_refused() -> None:
    model = tiny_model(vocabulary=V)

    def reshape(module: Any, inputs: Any, output: Any) -> None:
        output.logits += output.logits.roll(1, -1).square()

    model.register_forward_hook(reshape)
    with pytest.raises(ModelError, match=r"differ by .*targets.logits.kind: top-k"):
        OutputLayer.of(model, vocabulary_size=V)


def test_a_teacher_that_is_certain_is_stored_too() -> None:
    model = tiny_model(vocabulary=V)
    hidden, logits = observe(model)
    kind = calibrate(HeadSketch(6, 16, 0.1, V, 600), OutputLayer.of(model, vocabulary_size=V), hidden)
    certain = torch.full_like(logits[0], -500.0)
    certain[:, 7] = 0.0
    certain[:, 9:] = -torch.inf  # tokens that are ruled out
    arrays = stored_arrays(kind, certain, hidden[0])
    for temperature in (1.0, 3.0):
        ids, probabilities = kind.softened(arrays, temperature).topk(1)
        assert (ids == 7).all()
        np.testing.assert_allclose(probabilities, 1, atol=1e-3)


def test_a_sample_smaller_than_the_rank_is_refused() -> None:
    model = tiny_model(vocabulary=V)
    hidden, _ = observe(model, rows=1, length=20)
    with pytest.raises(ModelError, match="needs a calibration sample of 48 positions, the corpus gives 20"):
        calibrate(HeadSketch(6, 24, 0.1, V, 600), OutputLayer.of(model, vocabulary_size=V), hidden)


def test_reading_without_a_basis_says_where_it_should_be() -> None:
    with pytest.raises(CacheError, match="the sketch basis in the cache's teacher/ folder"):
        HeadSketch(6, 24, 0.1, V, 600).decoded({})


@pytest.mark.parametrize("layout", ["documents", "packed"])
def test_a_cache_holds_what_the_teacher_says(tmp_path: Path, layout: str) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    folder = tiny_cache(
        tmp_path, teacher=teacher, texts=sentences(60), sequence={"layout": layout}, targets={"logits": SETTINGS}
    )
    assert verify(folder) == []
    cache = Cache.open(folder)
    calibrated = set(cache.manifest.calibration["rows"])
    assert calibrated and cache.manifest.fidelity["positions"] > 0
    model = tiny_model_of(teacher)
    divergences = []
    for split in ("train", "held-out"):
        for index in range(min(6, cache.rows_of(split))):
            stored = cache.read_row(split, index)
            if split == "held-out":
                assert stored.row.row_id not in calibrated
            if layout == "packed":
                continue
            with torch.inference_mode():
                logits = model(torch.from_numpy(stored.row.input_ids_S.astype(np.int64))[None]).logits[0].float()
            chosen = logits[torch.from_numpy(stored.row.target_mask_S)][:, : cache.manifest.vocabulary_size]
            dense = torch.from_numpy(cache.kind.softened(cache.kind.decoded(stored.targets), 2.0).dense())
            divergences += kl_divergence(chosen / 2, dense).tolist()
    if layout == "documents":
        assert np.mean(divergences) < 0.05
        assert cache.manifest.fidelity["kl"]["2"] < 0.05


def tiny_model_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()
