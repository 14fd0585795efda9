"""Targets of kind hidden: the teacher's own logits up to quantisation, at any temperature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacher.output_layers import MODELS, V, observe
from teachercache.errors import CacheDamaged, CacheError, ModelError
from teachercache.targets import FinalHidden, SketchBasis, target_kind
from teachercache.teacher.calibration import calibrate
from teachercache.teacher.fidelity import kl_divergence
from teachercache.teacher.output_layer import OutputLayer

from builders import tiny_model
from target_kinds import as_tensors, stored_arrays, walk_through_a_cache

WIDTH = 32


def calibrated(model: Any, *, step: float) -> FinalHidden:
    hidden, _ = observe(model)
    kind = FinalHidden(WIDTH, step, V, 600)
    made = calibrate(kind, OutputLayer.of(model, vocabulary_size=V), hidden)
    assert isinstance(made, FinalHidden)
    return made


def divergence(kind: FinalHidden, model: Any, temperature: float) -> float:
    hidden, logits = observe(model, rows=2, seed=9)
    arrays = stored_arrays(kind, logits[0], hidden_ND=hidden[0])
    dense = torch.from_numpy(kind.softened(arrays, temperature).dense())
    return float(np.mean([kl_divergence(z / temperature, p) for z, p in zip(logits[0], dense, strict=True)]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_every_output_layer_is_rebuilt(name: str, temperature: float) -> None:
    model = MODELS[name]()
    assert divergence(calibrated(model, step=1 / 1024), model, temperature) < 1e-5


def test_finer_steps_are_more_faithful() -> None:
    model = tiny_model(vocabulary=V)
    coarse, default, fine = (divergence(calibrated(model, step=step), model, 1.0) for step in (1 / 4, 1 / 32, 1 / 256))
    assert fine < default / 10 < coarse / 100


def test_outliers_are_never_clipped() -> None:
    model = tiny_model(vocabulary=V)
    kind = calibrated(model, step=1 / 32)
    assert kind.basis is not None
    hidden, logits = observe(model, rows=1)
    h = hidden[0].clone()
    h[3, 7] = 5e4
    read = stored_arrays(kind, logits[0], hidden_ND=h)["coefficients"] / kind.basis.analysis_Dr + kind.basis.mean_D
    np.testing.assert_allclose(read, h.numpy(), atol=float(1 / kind.basis.analysis_Dr.min()) / 60, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_states_that_are_no_numbers_are_unusable(bad: float) -> None:
    model = tiny_model(vocabulary=V)
    kind, (hidden, logits) = calibrated(model, step=1 / 32), observe(model, rows=1)
    h = hidden[0][:4].clone()
    h[1, 7] = bad
    captured = kind.capture(torch, logits[0][:4].clone(), torch.arange(4), h)
    assert kind.is_usable(captured).tolist() == [True, False, True, True]


def test_the_matrix_survives_its_file_and_torch_agrees(tmp_path: Path) -> None:
    model = tiny_model(vocabulary=V)
    kind, (hidden, logits) = calibrated(model, step=1 / 32), observe(model, rows=1)
    assert kind.basis is not None and kind.basis.basis_Vr.dtype == np.float16
    again = target_kind(kind.settings(), vocabulary_size=V, basis=kind.basis.save(tmp_path))
    arrays = stored_arrays(kind, logits[0], hidden_ND=hidden[0])
    expected = kind.softened(arrays, 3.0).dense()
    np.testing.assert_array_equal(again.softened(arrays, 3.0).dense(), expected)
    in_torch = again.softened(as_tensors(arrays), 3.0, xp=torch)
    np.testing.assert_allclose(in_torch.dense().numpy(), expected, atol=1e-4)
    ids, probabilities = kind.softened(arrays, 3.0).topk(4)
    np.testing.assert_allclose(probabilities, np.exp(-np.sort(-expected, axis=1)[:, :4]), rtol=1e-5)
    assert calibrated(model, step=1 / 512).basis.basis_Vr.dtype == np.float32  # type: ignore[union-attr]
    assert ids.shape == (len(logits[0]), 4)


class Named(FinalHidden):
    """As an extension may have it: the kind under another name."""

    kind = "named"


def test_a_subclass_of_a_kind_is_calibrated_as_that_is() -> None:
    model = tiny_model(vocabulary=V)
    hidden, _ = observe(model, rows=1)
    made = calibrate(Named(WIDTH, 0.1, V, 600), OutputLayer.of(model, vocabulary_size=V), hidden)
    assert type(made) is Named and made.basis is not None


def test_a_kind_that_nothing_is_known_to_fit_is_refused_in_a_line() -> None:
    class Unknown:
        kind = "unknown"

    model = tiny_model(vocabulary=V)
    with pytest.raises(ModelError, match="kind unknown are read by a basis, .* add Unknown to CALIBRATIONS") as caught:
        calibrate(Unknown(), OutputLayer.of(model, vocabulary_size=V), [])  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_refusals_name_the_remedy() -> None:
    model = tiny_model(vocabulary=V)
    hidden, _ = observe(model, rows=1)
    with pytest.raises(ModelError, match="width is 48, but the teacher's output layer is 32 wide; set it to 32"):
        calibrate(FinalHidden(48, 0.1, V, 600), OutputLayer.of(model, vocabulary_size=V), hidden)
    with pytest.raises(CacheError, match="the output matrix in the cache's teacher/ folder"):
        FinalHidden(WIDTH, 0.1, V, 600).softened({"coefficients": np.zeros((1, WIDTH))}, 1.0)
    with pytest.raises(CacheError, match="use sketch or auto"):
        FinalHidden(WIDTH, 0.1, V, 600).objective_columns("ghost")
    kind = calibrated(model, step=0.1)
    assert isinstance(kind.basis, SketchBasis)
    with pytest.raises(CacheDamaged, match="has 32 channels for 300 tokens, the manifest says 31"):
        FinalHidden(31, 0.1, V, 600).with_basis(kind.basis)


def test_a_whole_cache(tmp_path: Path) -> None:
    cache, _ = walk_through_a_cache(tmp_path, {"kind": "hidden", "calibration_positions": 200}, temperature=0.7)
    assert cache.kind.settings()["width"] == WIDTH
    assert max(cache.manifest.fidelity["kl"].values()) < 1e-3
    assert cache.manifest.read_by["logits"]["basis"].startswith("teacher/")
