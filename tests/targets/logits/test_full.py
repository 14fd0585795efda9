"""Targets of kind full: the teacher's own distribution, at any temperature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from teachercache.config import parse_recipe
from teachercache.errors import CacheError, RecipeError
from teachercache.targets import Full, target_kind

from target_kinds import as_tensors, log_softmax, random_logits, stored_arrays, stored_columns, walk_through_a_cache

V = 40


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 20.0])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float16", 1 / 2048)])
def test_softened_distribution_equals_the_dense_softmax(dtype: str, bound: float, temperature: float) -> None:
    z = random_logits(30, V)
    kind = Full(dtype, V)
    arrays = stored_arrays(kind, z)
    exact = log_softmax(z, temperature)
    allowed = 2 * bound * np.abs(log_softmax(z, 1.0)).max() / temperature + 2e-6
    dense = kind.softened(arrays, temperature, tail="uniform").dense()
    np.testing.assert_allclose(dense, exact, atol=allowed)
    in_torch = kind.softened(as_tensors(arrays), temperature, tail="uniform", xp=torch).dense()
    np.testing.assert_allclose(in_torch.numpy(), dense, atol=1e-5)
    ids, probabilities = kind.softened(arrays, temperature).topk(3)
    np.testing.assert_allclose(probabilities, -np.sort(-np.exp(exact), axis=1)[:, :3], rtol=2 * allowed)
    assert ids.shape == (30, 3)


def test_padded_rows_and_ruled_out_tokens() -> None:
    z = random_logits(8, V)
    z[:, 5] = -torch.inf
    padded = torch.cat([z, torch.full((8, 6), 100.0)], dim=1)
    kind = Full("float32", V)
    plain, wide = stored_columns(kind, z), stored_columns(kind, padded)
    np.testing.assert_array_equal(plain["log_probs"], wide["log_probs"])
    softened = kind.softened(kind.decoded(plain), 2.0)
    assert np.isneginf(softened.head_log_prob_Nk[:, 5]).all()
    np.testing.assert_allclose(np.exp(softened.head_log_prob_Nk).sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_unusable(bad: float) -> None:
    z, kind = random_logits(5, V), Full("float16", V)
    z[3, 7] = bad
    captured = kind.capture(torch, z, torch.zeros(5, dtype=torch.int64))
    assert kind.is_usable(captured).tolist() == [True, True, True, False, True]


def test_refusals_name_the_remedy() -> None:
    settings = {"kind": "full", "dtype": "float16"}
    assert target_kind(settings, vocabulary_size=4096).settings() == settings
    with pytest.raises(RecipeError, match="would store 4,097 numbers a position, .*use kind: head\\+sketch, or hidden"):
        target_kind(settings, vocabulary_size=4097)
    with pytest.raises(CacheError, match="have no tail; use auto"):
        Full("float16", V).objective_columns("renormalise")
    with pytest.raises(CacheError, match="use T > 0"):
        Full("float16", V).check_temperature(-1.0)


@pytest.mark.parametrize("tail", ["auto", "uniform"])
def test_a_whole_cache(tmp_path: Path, tail: str) -> None:
    cache, divergence = walk_through_a_cache(tmp_path, {"kind": "full"}, temperature=1.7, tail=tail)
    assert cache.manifest.fidelity["kl"]["1"] < 1e-4
    rows = [cache.read_row("train", index) for index in range(3)]
    dense = [cache.kind.softened(cache.kind.decoded(row.targets), 1.7).head_log_prob_Nk for row in rows]
    log_p = np.concatenate(dense).astype(np.float64)
    uniform_student = (np.exp(log_p) * (log_p + np.log(cache.kind.vocabulary_size))).sum(-1).mean()
    assert float(divergence) == pytest.approx(uniform_student, rel=1e-4)


def test_a_wrong_key_of_any_kind_is_answered_with_that_kinds_keys() -> None:
    with pytest.raises(RecipeError, match=r"unknown key `targets.logits.dtypes`; did you mean `dtype`\?"):
        parse_recipe({"cache": "c", "targets": {"logits": {"kind": "full", "dtypes": 1}}}, origin="r")
