"""Boundary mass: exact, coded within its bound, the same in any batch, beside every kind of logits, and absent on demand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher.rows import make_row
from teachercache.cache import Cache, verify
from teachercache.cache.inspection import describe
from teachercache.cache.manifest.manifest import MANIFEST
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.targets import BoundaryMass, StoredTargets, TopK
from teachercache.targets.logits.boundary_mass import LEAST, STEP
from teachercache.teacher import Teacher
from teachercache.tokens.pretokens import begins_pretoken

from builders import build_cache, sentences, tiny_cache, tiny_model, tiny_recipe, tiny_teacher
from target_kinds import random_logits

V = 300


def some_set(seed: int = 0, *, vocabulary: int = V) -> BoundaryMass:
    return BoundaryMass.of(np.random.default_rng(seed).random(vocabulary) < 0.6)


def naive(kind: BoundaryMass, logits_NV: torch.Tensor) -> np.ndarray:
    """In float64, token by token."""
    rows = logits_NV.double().numpy()[:, : kind.vocabulary_size]
    assert kind.begins_V is not None
    masses = []
    for row_V in rows:
        weights_V = np.exp(row_V - row_V.max())
        inside = sum(weight for weight, begins in zip(weights_V, kind.begins_V, strict=True) if begins)
        masses.append(np.log(inside / weights_V.sum()) if inside else -np.inf)
    return np.array(masses)


def bound(log_mass_N: np.ndarray) -> np.ndarray:
    """Half a step of the root, and what float32 sums lose."""
    return np.sqrt(-log_mass_N) * STEP + STEP**2 / 4 + 1e-6


def stored(kind: BoundaryMass, logits_NV: torch.Tensor) -> np.ndarray:
    """Captured, coded, decoded."""
    captured = kind.capture(torch, logits_NV)
    assert kind.is_usable(captured).all()
    [column] = kind.columns
    finished = kind.finish(captured)[column.name]
    tables, (page,) = column.encode([finished])
    read = column.decoder(tables)(page, len(logits_NV))
    np.testing.assert_array_equal(read, finished)
    found = kind.decoded({column.name: read})[column.name]
    assert found.dtype == np.float32 and found.shape == (len(logits_NV),)
    return found


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_masses_equal_their_naive_twin(scale: float) -> None:
    kind, logits_NV = some_set(), random_logits(200, V, scale=scale)
    before = logits_NV.clone()
    exact = np.maximum(naive(kind, logits_NV), LEAST)
    captured = kind.capture(torch, logits_NV)["boundary_log_mass"]
    np.testing.assert_allclose(np.maximum(captured, LEAST), exact, atol=1e-6, rtol=3e-6)
    assert torch.equal(logits_NV, before)  # what captures after it needs them
    assert (np.abs(stored(kind, logits_NV) - exact) <= bound(exact)).all()


def test_padded_rows_of_the_output_layer_take_no_part() -> None:
    kind, logits_NV = some_set(), random_logits(20, V)
    padded = torch.cat([logits_NV, torch.full((20, 37), 100.0)], dim=1)
    np.testing.assert_array_equal(stored(kind, padded), stored(kind, logits_NV))


def test_all_mass_none_and_tokens_that_are_ruled_out() -> None:
    kind, logits_NV = some_set(), random_logits(4, V)
    begins_V = torch.from_numpy(kind.begins_V)
    logits_NV[0, begins_V] = -torch.inf
    logits_NV[1, ~begins_V] = -torch.inf
    logits_NV[2, begins_V] -= 300.0
    found = stored(kind, logits_NV)
    assert found[0] == found[2] == pytest.approx(LEAST, abs=bound(np.array(LEAST))) and found[1] == 0.0
    assert np.isfinite(found).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_unusable(bad: float) -> None:
    kind, logits_NV = some_set(), random_logits(5, V)
    logits_NV[3, 7] = bad
    assert kind.is_usable(kind.capture(torch, logits_NV)).tolist() == [True, True, True, False, True]


@given(st.lists(st.floats(LEAST, 0.0), min_size=1, max_size=50))
def test_codes_are_off_by_half_a_step(values: list[float]) -> None:
    exact = np.array(values)
    kind = some_set()
    codes = kind.finish({"boundary_log_mass": exact})["boundary_log_mass"]
    assert codes.dtype == np.uint16
    decoded = kind.decoded({"boundary_log_mass": codes})["boundary_log_mass"].astype(np.float64)
    assert (np.abs(decoded - exact) <= np.sqrt(-exact) * STEP + STEP**2 / 4 + 1e-5).all()
    assert kind.columns[0].within == (0, kind.finish({"boundary_log_mass": np.array([-1e9])})["boundary_log_mass"][0])


@pytest.mark.parametrize("vocabulary", [300, 49_152])
def test_the_other_positions_of_a_batch_change_nothing(vocabulary: int) -> None:
    kind, logits_NV = some_set(vocabulary=vocabulary), random_logits(24, vocabulary)
    together = stored(kind, logits_NV)
    for size in (1, 5, 8):
        apart = [stored(kind, logits_NV[start : start + size]) for start in range(0, 24, size)]
        np.testing.assert_array_equal(np.concatenate(apart), together)


def test_a_set_is_written_once_under_its_name_and_read_back(tmp_path: Path) -> None:
    kind = some_set()
    path = kind.save(tmp_path)
    assert path.name == kind.file and kind.save(tmp_path) == path and len(list(tmp_path.iterdir())) == 1
    again = BoundaryMass.from_settings(kind.settings(), vocabulary_size=V).with_set(path)
    np.testing.assert_array_equal(again.begins_V, kind.begins_V)
    assert json.loads(json.dumps(kind.settings())) == again.settings() and some_set(1).file != kind.file


# --------------------------------------------------------------------------- in caches

LOGITS: dict[str, dict[str, Any]] = {
    "top-k": {"kind": "top-k", "k": 8},
    "top-p": {"kind": "top-p", "k": 8},
    "random-sampling": {"kind": "random-sampling", "draws": 20},
    "full": {"kind": "full"},
    "hidden": {"kind": "hidden", "calibration_positions": 100},
    "head+sketch": {"kind": "head+sketch", "k": 6, "rank": 8, "step": 0.1, "calibration_positions": 100},
}


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize("logits", LOGITS)
def test_every_kind_of_logits_has_it_beside_it(tmp_path: Path, logits: str, layout: str) -> None:
    teacher = tiny_teacher(tmp_path / "teacher", padded_vocabulary=20)
    sections: dict[str, Any] = {"sequence": {"layout": layout}, "texts": sentences(12)}
    layers = {"hidden": {"layers": [1]}} if logits == "top-k" else {}
    targets: dict[str, Any] = {"logits": LOGITS[logits], **layers}
    folder = tiny_cache(tmp_path / "with", teacher=teacher, targets=targets, **sections)
    assert verify(folder) == []
    cache = Cache.open(folder)
    begins_V = begins_pretoken(load_tokenizer(str(teacher)))
    assert cache.targets.boundary is not None and cache.targets.boundary.begins_V is None  # read by those who ask
    assert cache.boundary is not None
    np.testing.assert_array_equal(cache.boundary.begins_V, begins_V)
    assert cache.manifest.targets["boundary_mass"]["tokens"] == begins_V.sum()
    assert (
        0 < describe(cache)["bytes_per_position"]["boundary_mass"] < 20
        and "pre-token" in (folder / "README.md").read_text()
    )

    model, kind = load_causal_lm(str(teacher)), BoundaryMass.of(begins_V)
    compared = 0
    for index in range(cache.rows_of("train")):
        read = cache.read_row("train", index, columns=("boundary_log_mass",))
        found = cache.targets.decoded(read.targets)["boundary_log_mass"]
        if layout == "documents":
            with torch.no_grad():
                logits_SV = model(torch.from_numpy(read.row.input_ids_S.astype(np.int64))[None]).logits[0]
            exact = naive(kind, logits_SV[torch.from_numpy(read.row.target_mask_S)])
            assert (np.abs(found - exact) <= bound(exact) + 1e-4).all()  # padding of batches rounds otherwise
        compared += len(found)
    assert compared == cache.positions_of("train")

    targets["boundary_mass"] = False
    without = Cache.open(tiny_cache(tmp_path / "without", teacher=teacher, targets=targets, **sections))
    assert "boundary_mass" not in without.manifest.targets and not list((without.folder / "teacher").glob("boundary-*"))
    assert without.boundary is None and without.manifest.audit == cache.manifest.audit
    for index in range(cache.rows_of("train")):
        with_it, plain = (each.read_row("train", index).targets for each in (cache, without))
        assert with_it.keys() - plain.keys() == {"boundary_log_mass"}
        assert all(np.array_equal(plain[name], with_it[name], equal_nan=True) for name in plain)


def test_packed_rows_have_the_masses_of_their_documents(tmp_path: Path) -> None:
    """Position by position, found by the segment that it is in."""
    teacher = tiny_teacher(tmp_path / "teacher")
    masses: list[dict[Any, np.ndarray]] = []
    for layout in ("documents", "packed"):
        cache = Cache.open(tiny_cache(tmp_path / layout, teacher=teacher, sequence={"layout": layout, "length": 64}))
        masses.append({})
        for index in range(cache.rows_of("train")):
            read = cache.read_row("train", index, columns=("boundary_log_mass",))
            values = cache.targets.decoded(read.targets)["boundary_log_mass"]
            segment_N = read.row.segment_S()[read.row.target_mask_S]
            for number, segment in enumerate(read.row.segments):
                masses[-1][segment.source_id, segment.byte_start] = values[segment_N == number]
    documents, packed = masses
    assert documents.keys() == packed.keys() and len(documents) > 10
    for key, values in documents.items():
        np.testing.assert_allclose(packed[key], values, atol=2e-2)


def test_a_cache_from_before_reads_as_it_is(tmp_path: Path) -> None:
    """Its manifest does not know of it; neither do its shards."""
    folder = tiny_cache(tmp_path, texts=sentences(8), targets={"boundary_mass": False})
    assert b"boundary" not in (folder / MANIFEST).read_bytes()
    assert Cache.open(folder).read_row("train", 0).targets.keys() == {
        "head_ids", "head_logits", "tail_log_partition", "actual_log_prob",
    }  # fmt: skip


def test_rows_without_numbers_are_quarantined_as_before() -> None:
    model = tiny_model(vocabulary=V, tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    rows = [make_row(10, seed=1), make_row(10, seed=2)]
    rows[0].input_ids_S[rows[0].input_ids_S == 7] = 8
    rows[1].input_ids_S[6] = 7
    plain = StoredTargets(TopK(8, (1.0,), "float32", V))
    both = [
        Teacher.of(model, targets=targets, layout="documents", pad_id=0).capture(rows, positions_per_batch=64)
        for targets in (plain, dataclasses.replace(plain, boundary=some_set()))
    ]
    assert [[item.problem for item in captured] for captured in both] == [
        [None, "the teacher's logits are not finite at 9 of 9 positions"]
    ] * 2


def test_a_resumed_job_writes_the_same_bytes(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    whole = tiny_cache(tmp_path / "whole", teacher=teacher)
    recipe = tiny_recipe(tmp_path / "resumed", teacher=teacher)
    build_cache(recipe, units=1)
    resumed = build_cache(recipe)
    for path in sorted((whole / "shards").iterdir()):
        assert path.read_bytes() == (resumed / "shards" / path.name).read_bytes()
